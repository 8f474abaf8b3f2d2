"""Families with one square view whose adapter merges neighbouring patches.

Where a stock processor adds tiles, the view of the whole image alone is run: the thumbnail.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .base import Family, image_size, patch_size


def _merging(model_class: str, factor: Callable[[PreTrainedConfig], float], **kwargs) -> Family:
    """`factor` patches down and across become a token; the encoder's states are these patches side by side."""
    return Family(
        model_class,
        image_px=image_size,
        token_px=lambda config: round(patch_size(config) * factor(config)),
        encoder_width=lambda config: round(config.vision_config.hidden_size * factor(config) ** 2),
        **kwargs,
    )


def _one_view(model: PreTrainedModel, pixels: Tensor, is_image: Tensor) -> dict:
    return {"pixel_values": pixels[:, None]}


def _idefics(model_class: str) -> Family:
    return _merging(
        model_class,
        lambda config: config.scale_factor,
        adapter=("connector",),
        entry="connector.modality_projection",
        inputs=_one_view,
        language_model="text_model",
        opening="<fake_token_around_image><global-img>",
    )


MERGED = {
    "internvl": _merging(
        "InternVLForConditionalGeneration",
        lambda config: 1 / config.downsample_ratio,
        placeholder="<IMG_CONTEXT>",
        opening="<img>",
    ),
    "idefics3": _idefics("Idefics3ForConditionalGeneration"),
    "smolvlm": _idefics("SmolVLMForConditionalGeneration"),
    "aya_vision": _merging(
        "AyaVisionForConditionalGeneration",
        lambda config: config.downsample_factor,
        entry="multi_modal_projector.linear_1",
        opening="<|START_OF_IMG|>TILE_GLOBAL",
    ),
    "cohere2_vision": _merging(
        "Cohere2VisionForConditionalGeneration",
        lambda config: config.downsample_factor,
        entry="multi_modal_projector.linear_1",
        placeholder="<|IMG_PATCH|>",
        opening="<|START_OF_IMG|>",
    ),
    # the adapter is a linear layer onto a visual vocabulary, softmax, and that vocabulary's embeddings
    "ovis2": _merging(
        "Ovis2ForConditionalGeneration",
        lambda config: config.vision_config.hidden_stride,
        adapter=("vision_tower.head_linear", "vision_tower.head_norm", "visual_embeddings_table"),
        opening="<IMG_START>",
        shared_prefix=False,  # <IMG_START> gets its embedding from that vocabulary, if an image is there
    ),
}
