"""LLaVA-1.5 training with causal or bidirectional attention among image tokens (arXiv 2603.17228).

Names are imported when they are first used, so that the command line answers `--help` at once. Using one of the model's
also makes transformers' Auto classes know it.
"""

from importlib import import_module

_HOME = {
    "LlavaBidirConfig": ".model.modeling_llava_bidir",
    "LlavaBidirForConditionalGeneration": ".model.modeling_llava_bidir",
    "IMAGE_ATTENTION": ".model.attention",
    "register_image_attention": ".model.attention",
}
__all__ = list(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
