"""DeepSeek-VL and Janus: SigLIP, in DeepSeek-VL's larger model beside a SAM-B that sees 1024 px."""

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import PreTrainedConfig, PreTrainedModel

from .base import Family, image_size, patch_size


def _high_res_px(config: PreTrainedConfig) -> int:
    return config.high_res_vision_config.image_size


def _hybrid_token_px(config: PreTrainedConfig) -> Fraction:
    """SigLIP's 384 / 16 = 24 tokens a side; SAM's are resampled to as many, so that a token is 1024 / 24 px wide."""
    return Fraction(_high_res_px(config), image_size(config) // patch_size(config))


def _two_resolutions(model: PreTrainedModel, pixels: Tensor, is_image: Tensor) -> dict:
    """The image at SAM's resolution, normalised once for each encoder, SigLIP's reduced to its size.

    Deviates: the stock processor reduces 8-bit pixels and this normalised ones, a difference of less than a grey level.
    """
    low, high = pixels.split(3, dim=1)
    px = model.config.vision_config.image_size
    # antialiased as PIL does; not in bf16 on every device
    low = interpolate(low.float(), (px, px), mode="bicubic", antialias=True).to(pixels.dtype)
    return {"pixel_values": low, "high_res_pixel_values": high}


DEEPSEEK = {
    "deepseek_vl": Family(
        "DeepseekVLForConditionalGeneration",
        image_px=image_size,
        token_px=patch_size,
        encoder_width=lambda config: config.vision_config.hidden_size,
        adapter=("aligner",),
        placeholder="<image_placeholder>",
    ),
    "deepseek_vl_hybrid": Family(
        "DeepseekVLHybridForConditionalGeneration",
        image_px=_high_res_px,
        token_px=_hybrid_token_px,
        # SigLIP's states, then SAM's
        encoder_width=lambda config: (
            config.vision_config.hidden_size + 4 * config.high_res_vision_config.output_channels
        ),
        adapter=("aligner",),
        encoder_states=lambda model, args: torch.cat(args, dim=-1),
        inputs=_two_resolutions,
        normalisations=(("image_mean", "image_std"), ("high_res_image_mean", "high_res_image_std")),
        placeholder="<image_placeholder>",
    ),
    "janus": Family(
        "JanusForConditionalGeneration",
        image_px=image_size,
        token_px=patch_size,
        encoder_width=lambda config: config.vision_config.hidden_size,
        adapter=("aligner",),
        placeholder="<image_placeholder>",
        opening="<begin_of_image>",
    ),
}
