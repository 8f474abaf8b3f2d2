"""LLaVA-1.5 training with causal or bidirectional attention among image tokens (arXiv 2603.17228)."""

from transformers import AutoConfig, AutoModelForImageTextToText

from .attention import IMAGE_ATTENTION, register_image_attention
from .modeling import LlavaBidirConfig, LlavaBidirForConditionalGeneration

AutoConfig.register(LlavaBidirConfig.model_type, LlavaBidirConfig)
AutoModelForImageTextToText.register(LlavaBidirConfig, LlavaBidirForConditionalGeneration)

__all__ = ["IMAGE_ATTENTION", "LlavaBidirConfig", "LlavaBidirForConditionalGeneration", "register_image_attention"]
__version__ = "0.1.0"
