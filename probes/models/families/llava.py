"""LLaVA and what is built like it: one token a patch, one square view.

LLaVA-NeXT and OneVision put the view of the whole image before their tiles. Their image tokens attend backwards only,
so that the states of the whole view are those of the stock model with all its tiles, which are not run.
"""

from torch import Tensor
from transformers import LlavaModel, PreTrainedConfig, PreTrainedModel

from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration, build_mask, image_attention

from .base import Family, image_size, patch_size

__all__ = ["LLAVA", "build_mask", "image_attention"]


def _image_px(config: PreTrainedConfig) -> int:
    """Input side of a LLaVA: the encoder's own, unless the number of image tokens says that it was changed."""
    vision = config.vision_config
    tokens = round(config.image_seq_length**0.5)
    return vision.image_size if tokens == vision.image_size // vision.patch_size else tokens * vision.patch_size


def _encoder_width(config: PreTrainedConfig) -> int:
    """Some checkpoints concatenate several of the encoder's layers."""
    layers = config.vision_feature_layer
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _whole_view(model: PreTrainedModel, pixels: Tensor, is_image: Tensor) -> dict:
    """Encoder and adapter as in LLaVA, without tiles and newlines."""
    return {"mm_encoder_outputs": {"image": LlavaModel.get_image_features(model.model, pixels)}}


def _llava(model_class, **kwargs) -> Family:
    return Family(
        model_class, **{"image_px": _image_px, "token_px": patch_size, "encoder_width": _encoder_width} | kwargs
    )


LLAVA = {
    "llava_bidir": _llava(LlavaBidirForConditionalGeneration),
    "llava": _llava("LlavaForConditionalGeneration"),
    "vipllava": _llava("VipLlavaForConditionalGeneration"),
    "llava_next": _llava("LlavaNextForConditionalGeneration", image_px=image_size, inputs=_whole_view),
    "llava_onevision": _llava("LlavaOnevisionForConditionalGeneration", image_px=image_size, inputs=_whole_view),
}
