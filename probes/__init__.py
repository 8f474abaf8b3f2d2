"""Layer-by-layer segmentation probes for frozen MLLMs, and the analyses of arXiv 2603.17228.

Public names are imported on first use, so that `import probes` and `probes --help` do not import torch.
"""

from importlib import import_module

from llava_bidir import __version__ as __version__

_MODULES = {
    "load": ".models.load",
    "FrozenMLLM": ".models.frozen_mllm",
    "Knockout": ".models.knockout",
    "FrozenEncoder": ".models.frozen_encoder",
    "Family": ".models.families",
    "EncoderFamily": ".models.families",
    "EncoderModule": ".models.own_module",
    "register_family": ".models.families",
    "register_dataset": ".data.registry",
    "Probe": ".training.heads",
    "register_head": ".training.heads",
    "ProbeRun": ".results.probe_run",
    "FinishedRun": ".results.finished_run",
    "open_run": ".results.runs",
    "Claim": ".analyses.base",
    "Estimate": ".evaluation.estimate",
    "register_analysis": ".analyses.claims",
    "write_effects": ".analyses.effects",
    "study": ".studies.run",
    "Study": ".studies.table",
    "solve_features": ".training.solve.features",
    "prepare_masks": ".ops.quadrature",
    "upsampled_cross_entropy": ".ops.cross_entropy",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)
