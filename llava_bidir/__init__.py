"""LLaVA-1.5 training with causal or bidirectional attention among image tokens (arXiv 2603.17228).

Names are imported on first use, so that `--help` needs no torch. Importing a model class registers it with the Auto
classes of transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; the same names as in `_MODULES`
    from .common.encoders import EncoderKind as EncoderKind
    from .common.encoders import register_encoder as register_encoder
    from .model.attention import IMAGE_ATTENTION as IMAGE_ATTENTION
    from .model.attention import register_image_attention as register_image_attention
    from .model.configuration_llava_bidir import LlavaBidirConfig as LlavaBidirConfig
    from .model.modeling_llava_bidir import (
        LlavaBidirForConditionalGeneration as LlavaBidirForConditionalGeneration,
    )

_MODULES = {
    "LlavaBidirConfig": ".model.configuration_llava_bidir",
    "LlavaBidirForConditionalGeneration": ".model.modeling_llava_bidir",
    "IMAGE_ATTENTION": ".model.attention",
    "register_image_attention": ".model.attention",
    "EncoderKind": ".common.encoders",
    "register_encoder": ".common.encoders",
}
__all__ = list(_MODULES)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return __all__
