"""Layer-by-layer segmentation probes for frozen MLLMs, and the analyses of arXiv 2603.17228.

Names are imported when they are first used, so that the command line answers `--help` at once.
"""

from importlib import import_module

_HOME = {
    "load": ".models.frozen_mllm",
    "FrozenMLLM": ".models.frozen_mllm",
    "Knockout": ".models.knockout",
    "upsampled_cross_entropy": ".ops.cross_entropy",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
