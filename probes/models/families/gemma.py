"""Gemma 3 and 4 and PaliGemma: bidirectional attention among image tokens (in Gemma 4 not in all layers)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .base import Family, cut_patches, image_size, patch_size

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

# Gemma 4 accepts images of any shape, by default with at most 280 tokens; the largest square has 16 x 16.
GEMMA4_TOKENS_PER_SIDE = 16
# Source: PaliGemma's processor.
PALIGEMMA_TEMPLATE = "<image>{{ bos_token }}{{ messages[0]['content'][1]['text'] }}{{ '\n' }}"


def _gemma4_attention(config: PreTrainedConfig) -> str:
    """Return the mask: larger models are bidirectional within the sliding window, smaller ones causal."""
    if config.get_text_config().use_bidirectional_attention == "vision":
        return "bidirectional_sliding"
    return "causal"


def _gemma3_pixels(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return pixels and the types of tokens, without which Gemma 3 attends causally. Source: its processor."""
    return {"pixel_values": pixels, "token_type_ids": is_image.long()}


def _paligemma_pixels(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return pixels and the types of tokens: 1, an answer, after the image, so that the prefix ends with it."""
    images_from_here = is_image.flip(1).cumsum(1).flip(1)
    return {"pixel_values": pixels, "token_type_ids": (images_from_here == 0).long()}


def _gemma4_unified_attention(config: PreTrainedConfig) -> str:
    """Return the mask of a forward; with a static cache, `generate` has a causal one in layers of full attention."""
    if config.get_text_config().use_bidirectional_attention == "vision":
        return "bidirectional"
    return "causal"


def _merged_patch_px(config: PreTrainedConfig) -> int:
    """Return the side in pixels of the patches that are merged into a token."""
    return patch_size(config) * config.vision_config.pooling_kernel_size


def _gemma4_patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return patches and their places, see :func:`_split`, for the encoder."""
    return _split(patch_size(model.config), pixels, is_image)


def _merged_patches(model: "PreTrainedModel", pixels: Tensor, is_image: Tensor) -> dict:
    """Return patches of a token's size and their places, see :func:`_split`, which the LLM reads without an encoder."""
    return _split(_merged_patch_px(model.config), pixels, is_image)


def _split(patch: int, pixels: Tensor, is_image: Tensor) -> dict:
    """Return patches f[B, P, p x p x C] in raster order and their (x, y). Source: Gemma 4's image processor."""
    split = cut_patches(pixels, patch).movedim(3, -1)  # B, h, w, p, p, C
    rows, columns = split.shape[1:3]
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack([x, y], -1).flatten(0, 1)
    return {
        "pixel_values": split.flatten(3).flatten(1, 2),
        "image_position_ids": positions.expand(len(pixels), -1, -1).to(pixels.device),
        "mm_token_type_ids": is_image.int(),
    }


def _sites_before_own_inputs(config: PreTrainedConfig) -> int:
    """Return the number of sites before a layer that has inputs of its own."""
    text_config = config.get_text_config()
    if text_config.hidden_size_per_layer_input:
        return text_config.num_hidden_layers
    return 0


GEMMA = {
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        token_px=lambda config: image_size(config) // round(config.mm_tokens_per_image**0.5),
        encoder_output_module="multi_modal_projector.mm_soft_emb_norm",  # after averaging patches
        inputs=_gemma3_pixels,
        image_attention="bidirectional",
        placeholder="<start_of_image>",
        image_start_text="\n\n<start_of_image>",
        image_end_text="<end_of_image>\n\n",
    ),
    # States are read without a question, which would be part of the bidirectional block. Position ids begin at 1.
    "paligemma": Family(
        "PaliGemmaForConditionalGeneration",
        inputs=_paligemma_pixels,
        image_attention="prefix",
        own_template=PALIGEMMA_TEMPLATE,
        question_in_prefix=True,
    ),
    "gemma4": Family(
        "Gemma4ForConditionalGeneration",
        image_px=lambda config: GEMMA4_TOKENS_PER_SIDE * _merged_patch_px(config),
        token_px=_merged_patch_px,
        adapter=("embed_vision",),
        encoder_output_module="embed_vision.embedding_projection",
        inputs=_gemma4_patches,
        image_attention=_gemma4_attention,
        placeholder="<|image|>",
        image_start_text="<|image>",
        image_end_text="<image|>",
        rows_share_encoder=False,  # layers have further inputs, computed from all ids and from the adapter's outputs
        incomplete_sites=_sites_before_own_inputs,
    ),
    # No encoder: "encoder" are the embeddings of the patches with their positions.
    "gemma4_unified": Family(
        "Gemma4UnifiedForConditionalGeneration",
        image_px=lambda config: GEMMA4_TOKENS_PER_SIDE * _merged_patch_px(config),
        token_px=_merged_patch_px,
        encoder_width=lambda config: config.vision_config.mm_embed_dim,
        adapter=("embed_vision.multimodal_embedder",),
        inputs=_merged_patches,
        vision_tower=None,
        image_attention=_gemma4_unified_attention,
        placeholder="<|image|>",
        image_start_text="<|image>",
        image_end_text="<image|>",
    ),
}
