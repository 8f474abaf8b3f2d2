"""LLaVA and models of the same design: one token per patch, one square view.

LLaVA-NeXT and OneVision put the full view before its tiles. Their image tokens attend backwards only, so that states of
the full view do not depend on the tiles, which are not run.
"""

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedConfig

from llava_bidir.common.encoders import ENCODERS, plain_inputs, square_side

from .base import Family, image_size

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

OUR_CLASS = "probes.models.families.our_code:LlavaBidirForConditionalGeneration"


def _image_px(config: PreTrainedConfig) -> int:
    """Return the input side: the encoder's own, or that of the image tokens where it fits its positions by itself.

    `image_seq_length` alone does not tell: checkpoints without it (LLaVA-Interleave) have transformers' default, 576.
    """
    vision = config.vision_config
    kind = ENCODERS.get(vision.model_type)
    fits_positions = kind is not None and kind.any_side and kind.inputs is plain_inputs
    if not fits_positions:
        return vision.image_size
    return round(config.image_seq_length**0.5) * square_side(vision.patch_size)


def _encoder_width(config: PreTrainedConfig) -> int:
    """Return the encoder width; some checkpoints concatenate several layers of the encoder."""
    width = config.vision_config.hidden_size
    layers = config.vision_feature_layer
    if isinstance(layers, int):
        return width
    return width * len(layers)


def _full_view(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return encoder and adapter outputs as in LLaVA, without tiles and newlines."""
    from transformers import LlavaModel

    return {"mm_encoder_outputs": {"image": LlavaModel.get_image_features(model.model, pixels)}}


def _llava(model_class, **kwargs) -> Family:
    settings = {"image_px": _image_px, "encoder_width": _encoder_width, "image_resize": None}
    return Family(model_class, **settings | kwargs)


_TILED = {"image_px": image_size, "inputs": _full_view, "image_resize": "squash"}
LLAVA = {
    "llava_bidir": _llava(OUR_CLASS),
    "llava": _llava("LlavaForConditionalGeneration"),
    "vipllava": _llava("VipLlavaForConditionalGeneration"),
    "llava_next": _llava("LlavaNextForConditionalGeneration", **_TILED),
    "llava_onevision": _llava("LlavaOnevisionForConditionalGeneration", **_TILED),
}
