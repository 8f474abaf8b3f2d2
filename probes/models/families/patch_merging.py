"""Families with one square view whose adapter merges neighbouring patches.

If the stock processor adds tiles, only the full view (thumbnail) is run.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedConfig

from llava_bidir.common.encoders import patch_inputs, stored_grid_side

from .base import Family, module_at, patch_size

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel


def _merging(model_class: str, factor: Callable[[PreTrainedConfig], float], **kwargs) -> Family:
    """Return a family that merges `factor` x `factor` patches per token, and concatenates their encoder states."""
    return Family(
        model_class,
        token_px=lambda config: round(patch_size(config) * factor(config)),
        encoder_width=lambda config: round(config.vision_config.hidden_size * factor(config) ** 2),
        **kwargs,
    )


def _one_view(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    return {"pixel_values": pixels[:, None]}


def _stored_grid_px(config: PreTrainedConfig) -> int:
    """Return the side in pixels of SigLIP 2's stored grid."""
    return stored_grid_side(config.vision_config)


def _patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    return patch_inputs(model.config.vision_config, pixels)


def _unshuffled(model: "PreTrainedModel", args: tuple) -> Tensor:
    """Return encoder states f[1, T x B, 1, m * m * d] from those of the patches, which the adapter merges itself."""
    return module_at(model, "multi_modal_projector", "model").pixel_unshuffle(args[0])


def _idefics(model_class: str) -> Family:
    return _merging(
        model_class,
        lambda config: config.scale_factor,
        adapter=("connector",),
        encoder_output_module="connector.modality_projection",
        inputs=_one_view,
        language_model="text_model",
        vision_tower="vision_model",
        image_start_text="<fake_token_around_image><global-img>",
        image_end_text="<fake_token_around_image>",
    )


def _internvl(model_class: str) -> Family:
    return _merging(
        model_class,
        lambda config: 1 / config.downsample_ratio,
        placeholder="<IMG_CONTEXT>",
        image_start_text="<img>",
        image_end_text="</img>",
    )


PATCH_MERGING = {
    "internvl": _internvl("InternVLForConditionalGeneration"),
    "qianfan_ocr": _internvl("QianfanOCRForConditionalGeneration"),
    # Most layers are convolutions: only the model's own, causal attention is possible.
    "lfm2_vl": _merging(
        "Lfm2VlForConditionalGeneration",
        lambda config: config.downsample_factor,
        image_px=_stored_grid_px,
        encoder_states=_unshuffled,
        inputs=_patches,
        norm="embedding_norm",
        image_start_text="<|image_start|>",
        image_end_text="<|image_end|>",
    ),
    "idefics3": _idefics("Idefics3ForConditionalGeneration"),
    "smolvlm": _idefics("SmolVLMForConditionalGeneration"),
    "aya_vision": _merging(
        "AyaVisionForConditionalGeneration",
        lambda config: config.downsample_factor,
        encoder_output_module="multi_modal_projector.linear_1",
        image_start_text="<|START_OF_IMG|>TILE_GLOBAL",
        image_end_text="<|END_OF_IMG|>",
    ),
    "cohere2_vision": _merging(
        "Cohere2VisionForConditionalGeneration",
        lambda config: config.downsample_factor,
        encoder_output_module="multi_modal_projector.linear_1",
        placeholder="<|IMG_PATCH|>",
        image_start_text="<|START_OF_IMG|>",
        image_end_text="<|IMG_LINE_BREAK|><|END_OF_IMG|>",
    ),
    # The adapter is a linear layer to a visual vocabulary, a softmax, and the embeddings of that vocabulary.
    "ovis2": _merging(
        "Ovis2ForConditionalGeneration",
        lambda config: config.vision_config.hidden_stride,
        adapter=("vision_tower.head_linear", "vision_tower.head_norm", "visual_embeddings_table"),
        image_start_text="<IMG_START>",
        image_end_text="<IMG_GRID><IMG_END>",
    ),
}
