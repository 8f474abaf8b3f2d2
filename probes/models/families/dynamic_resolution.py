"""Families that accept images of any size.

They receive one square, so that all images have the same grid: 24 x 24 tokens as LLaVA-1.5, whatever a token's size.
Encoders of Qwen and GLM take patches instead of images, ordered by the token that they are merged into.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .base import Family, cut_patches, patch_size, square_side

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

TOKENS_PER_SIDE = 24


def _grid_thw(model: "PreTrainedModel", images: int) -> Tensor:
    """Return time, rows and columns of the patches of each image, long[images, 3]."""
    patches = TOKENS_PER_SIDE * model.config.vision_config.spatial_merge_size
    return torch.tensor([[1, patches, patches]], device=model.device).expand(images, -1)


def _untyped_patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return patches f[B x P, channels x frames x p x p], grouped by token, with the image as all frames of a patch.

    Source: Qwen2-VL's image processor.
    """
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    patch = patch_size(model.config)
    images, channels = pixels.shape[:2]
    # B, C, h, m, p, w, m, p
    split = pixels.unflatten(3, (-1, merge, patch)).unflatten(2, (-1, merge, patch))
    split = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(-3)  # B, h, w, m, m, C, frame, p, p
    frames = split.expand(*split.shape[:-3], vision.temporal_patch_size, -1, -1)
    return {
        "pixel_values": frames.reshape(-1, channels * vision.temporal_patch_size * patch * patch),
        "image_grid_thw": _grid_thw(model, images),
    }


def _patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return the same with the types of tokens, from which positions are computed."""
    return _untyped_patches(model, pixels, is_image) | {"mm_token_type_ids": is_image.int()}


def _raster_patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return patches f[B x P, channels, p, p] in raster order. Source: image processors of both families."""
    patches = cut_patches(pixels, patch_size(model.config))
    rows, columns = patches.shape[1:3]
    grid = torch.tensor([[1, rows, columns]], device=model.device)
    return {"pixel_values": patches.flatten(0, 2), "image_grid_thw": grid.expand(len(pixels), -1)}


def _typed_raster_patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return the same with the types of tokens, from which positions are computed."""
    return _raster_patches(model, pixels, is_image) | {"mm_token_type_ids": is_image.int()}


def _unmerged_patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return patches f[B x P, channels x p x p] in raster order, none of which are merged."""
    inputs = _raster_patches(model, pixels, is_image)
    ones = torch.ones(len(pixels), dtype=torch.long, device=model.device)
    patches = inputs["pixel_values"].flatten(1)
    return inputs | {"pixel_values": patches, "image_merge_sizes": ones}


def _merge_raster(model: "PreTrainedModel", args: tuple) -> Tensor:
    """Return encoder states in raster order of patches, f[..., d], with the patches of a token side by side."""
    merge = model.config.vision_config.spatial_merge_size
    states = args[0].flatten(0, -2)
    cells = states.unflatten(0, (-1, TOKENS_PER_SIDE, merge, TOKENS_PER_SIDE, merge))
    return cells.transpose(2, 3).flatten(3)  # B, h, w, m * m * d


def _to_raster_order(model: "PreTrainedModel", args: tuple) -> Tensor:
    """Return encoder states in raster order; Qwen2.5-VL's encoder orders tokens by window."""
    from transformers.vision_utils import get_vision_window_index

    vision = model.config.vision_config
    states = args[0]
    images = len(states) // TOKENS_PER_SIDE**2
    grid = _grid_thw(model, images)
    order, _ = get_vision_window_index(
        grid,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return states[order.argsort()]


def _merging(factor: Callable[[PreTrainedConfig], int]) -> dict[str, Any]:
    """Return the sizes of a family that merges `factor` x `factor` patches per token."""
    return {
        "image_px": lambda config: TOKENS_PER_SIDE * patch_size(config) * factor(config),
        "token_px": lambda config: patch_size(config) * factor(config),
        "encoder_width": lambda config: config.vision_config.hidden_size * factor(config) ** 2,
    }


def _patch_family(model_class: str, module: str, **kwargs) -> Family:
    settings = _merging(lambda config: config.vision_config.spatial_merge_size) | {
        "adapter": ("visual.merger",),
        "vision_tower": "visual",
        "inputs": _patches,
        "placeholder": "<|image_pad|>",
        "rows_share_encoder": False,  # position ids are two-dimensional in the image
    }
    return Family(model_class, encoder_output_module=module, **settings | kwargs)


def _sizes_of_images(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[-2:]] * len(pixels))}


_PIXTRAL = _merging(lambda config: config.spatial_merge_size) | {"inputs": _sizes_of_images}

# Each merges patches in its adapter, which receives them one by one, in raster order.
_PADDLE = {
    "adapter": ("projector",),
    "vision_tower": "visual",
    "inputs": _typed_raster_patches,
    "encoder_states": _merge_raster,
}


_DEEPSTACK = {
    "adapter": ("visual.merger", "visual.deepstack_merger_list"),
    "incomplete_sites": lambda config: 1 + len(config.vision_config.deepstack_visual_indexes),
}
_GLM = {"adapter": ("visual.downsample", "visual.merger"), "placeholder": "<|image|>"}

DYNAMIC = {
    # `embed_dim` is the width of Qwen2-VL's encoder, `hidden_size` that of the LLM
    "qwen2_vl": _patch_family(
        "Qwen2VLForConditionalGeneration",
        "visual.merger.mlp",
        encoder_width=lambda config: (
            config.vision_config.embed_dim * config.vision_config.spatial_merge_size**2
        ),
    ),
    "qwen2_5_vl": _patch_family(
        "Qwen2_5_VLForConditionalGeneration", "visual.merger.mlp", encoder_states=_to_raster_order
    ),
    "exaone4_5": _patch_family(
        "Exaone4_5_ForConditionalGeneration",
        "visual.merger.mlp",
        encoder_states=_to_raster_order,
        inputs=_untyped_patches,
        placeholder="<|image_pad|>",
    ),
    # Features of earlier encoder layers are added after the first decoder layers; states are read before.
    "qwen3_vl": _patch_family(
        "Qwen3VLForConditionalGeneration", "visual.merger.linear_fc1", **_DEEPSTACK
    ),
    "qwen3_vl_moe": _patch_family(
        "Qwen3VLMoeForConditionalGeneration", "visual.merger.linear_fc1", **_DEEPSTACK
    ),
    "glm4v": _patch_family("Glm4vForConditionalGeneration", "visual.downsample", **_GLM),
    "glm4v_moe": _patch_family("Glm4vMoeForConditionalGeneration", "visual.downsample", **_GLM),
    "glm46v": _patch_family("Glm46VForConditionalGeneration", "visual.downsample", **_GLM),
    "glm_ocr": _patch_family("GlmOcrForConditionalGeneration", "visual.downsample", **_GLM),
    "paddleocr_vl": _patch_family("PaddleOCRVLForConditionalGeneration", "projector", **_PADDLE),
    # One token per patch of an image; the patches of videos are averaged.
    "video_llama_3": Family(
        "VideoLlama3ForConditionalGeneration",
        image_px=lambda config: TOKENS_PER_SIDE * patch_size(config),
        adapter=("projector",),
        vision_tower="vision_model",
        inputs=_unmerged_patches,
        placeholder="<|image_pad|>",
    ),
    "kimi_k25": Family(
        "Kimi_K25ForConditionalGeneration",
        adapter=("mm_projector",),
        inputs=_raster_patches,
        placeholder="<|media_pad|>",
        **_merging(lambda config: square_side(config.vision_config.merge_kernel_size)),
    ),
    # Three of four layers have linear attention: only the model's own, causal attention is possible.
    "qwen3_5": _patch_family("Qwen3_5ForConditionalGeneration", "visual.merger.linear_fc1"),
    "qwen3_5_moe": _patch_family("Qwen3_5MoeForConditionalGeneration", "visual.merger.linear_fc1"),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        encoder_output_module="multi_modal_projector.patch_merger.merging_layer",
        placeholder="[IMG]",
        row_separator="[IMG_BREAK]",
        image_end_text="[IMG_END]",
        **_PIXTRAL,
    ),
    "lighton_ocr": Family(
        "LightOnOcrForConditionalGeneration",
        adapter=("vision_projection",),
        vision_tower="vision_encoder",
        encoder_output_module="vision_projection.patch_merger.merging_layer",
        placeholder="<|image_pad|>",
        **_PIXTRAL,
    ),
}
