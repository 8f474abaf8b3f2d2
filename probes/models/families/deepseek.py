"""DeepSeek-VL and Janus: SigLIP, in DeepSeek-VL's larger model combined with a SAM-B of 1024 px."""

from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedConfig

from .base import Family, image_size, patch_size

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel


def _high_res_px(config: PreTrainedConfig) -> int:
    return config.high_res_vision_config.image_size


def _hybrid_token_px(config: PreTrainedConfig) -> Fraction:
    """Return 1024 / 24 px: SAM's tokens are resampled to SigLIP's 384 / 16 = 24 tokens per side."""
    return Fraction(_high_res_px(config), image_size(config) // patch_size(config))


def _two_resolutions(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return SAM's pixels and SigLIP's, which are normalised separately and resized to its input.

    Deviates: the stock processor resizes 8-bit pixels, this function normalised ones. They differ by < 1 grey level.
    """
    low, high = pixels.split(3, dim=1)
    px = model.config.vision_config.image_size
    # antialiased like PIL; float because not every device supports bf16 here
    low = interpolate(low.float(), (px, px), mode="bicubic", antialias=True).to(pixels.dtype)
    return {"pixel_values": low, "high_res_pixel_values": high}


_COMMON = {
    "adapter": ("aligner",),
    "image_resize": "letterbox",
    "placeholder": "<image_placeholder>",
}
_TOWER = {"vision_tower": "vision_model"}

DEEPSEEK = {
    "deepseek_vl": Family("DeepseekVLForConditionalGeneration", **_TOWER, **_COMMON),
    "deepseek_vl_hybrid": Family(
        "DeepseekVLHybridForConditionalGeneration",
        image_px=_high_res_px,
        token_px=_hybrid_token_px,
        # SigLIP's states, then SAM's
        encoder_width=lambda config: (
            config.vision_config.hidden_size + 4 * config.high_res_vision_config.output_channels
        ),
        encoder_states=lambda model, args: torch.cat(args, dim=-1),
        inputs=_two_resolutions,
        vision_tower=None,
        normalisations=(("image_mean", "image_std"), ("high_res_image_mean", "high_res_image_std")),
        **_COMMON,
    ),
    "janus": Family(
        "JanusForConditionalGeneration",
        image_start_text="<begin_of_image>",
        image_end_text="<end_of_image>",
        **_TOWER,
        **_COMMON,
    ),
}
