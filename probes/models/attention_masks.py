"""Attention masks of the decoder layers: full attention and sliding windows.

Shapes: B images, N tokens of prefix and image.
"""

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, PreTrainedConfig

from llava_bidir.common.errors import UserError

from .families.our_code import FULL, SLIDING, block_ids_of, build_mask, layer_kinds
from .hooks import with_arguments

# Masks that differ between kinds of layers, as {kind of layer: mask}.
MIXED_MASKS = {"bidirectional_sliding": {FULL: "causal", SLIDING: "bidirectional"}}  # Gemma 4's own

Masks = Tensor | dict[str, Tensor]


def supports_masks(text_config: PreTrainedConfig) -> bool:
    """Return True if all layers of a decoder attend under a mask; linear attention and convolutions do not."""
    return set(layer_kinds(text_config)) <= {FULL, SLIDING}


def mask_backend(text_config: PreTrainedConfig) -> str:
    """Return the attention backend for a decoder: "sdpa", or "eager" if it does not support that (Gemma 2)."""
    model_class = MODEL_MAPPING.get(type(text_config), None)
    if model_class is None or model_class._supports_sdpa:
        return "sdpa"
    return "eager"


def is_allowed(mask: Tensor) -> Tensor:
    """Return a mask as booleans, True = may attend; eager attention adds its mask to the scores, and it is 0 there."""
    if mask.dtype == torch.bool:
        return mask
    return mask == 0


def mask_values(dtype: torch.dtype) -> tuple[float, float]:
    """Return the values of a mask of a dtype where a token may attend, and where it may not."""
    if dtype == torch.bool:
        return True, False
    return 0.0, torch.finfo(dtype).min


def check_masks(name: str, text_config: PreTrainedConfig, backend: str) -> None:
    """Raise a UserError if the image attention is unknown or the attention backend ignores masks."""
    config = copy.copy(text_config)
    config._attn_implementation = backend
    try:
        if name not in MIXED_MASKS:
            block_ids_of(name)
        mask = build_mask("causal", config, torch.ones(1, 1, dtype=torch.bool))
    except ValueError as error:
        raise UserError(str(error)) from error
    if not isinstance(mask, Tensor):
        raise UserError(
            f"attn_implementation={backend!r} has no mask as a tensor; use 'sdpa' or 'eager'"
        )


def build_decoder_masks(
    name: str, text_config: PreTrainedConfig, is_image: Tensor, dtype: torch.dtype
) -> Masks:
    """Return the mask among prefix and image, bool[B, 1, N, N] (True = may attend), per kind of layer if several.

    Under eager attention the mask is additive, in `dtype`.

    Raises:
        UserError: A layer does not support the mask.
    """
    kinds = layer_kinds(text_config)
    if not supports_masks(text_config):
        others = ", ".join(sorted({*kinds} - {FULL, SLIDING}))
        raise UserError(
            f"image_attention {name!r} and knockouts are not supported by {others} layers, which have no mask; "
            "use this model with its own attention and without knockouts"
        )
    if name in MIXED_MASKS and SLIDING not in kinds:
        raise UserError(
            f"image_attention {name!r} needs sliding-window layers, which this model does not have"
        )
    by_kind = MIXED_MASKS.get(name, {})
    masks = {
        kind: build_mask(by_kind.get(kind, name), text_config, is_image, kind=kind, dtype=dtype)
        for kind in kinds
    }
    if len(kinds) == 1:
        return masks[kinds[0]]
    return masks


def cut_image(mask: Tensor, is_image: Tensor) -> Tensor:
    """Return a mask [B, 1, M, M] whose image tokens see only themselves and the text before, which does not see them.

    What stands between and after them, such as ends of rows, has read them. `is_image` bool[N] are the first N tokens.
    """
    tokens = torch.arange(mask.shape[-1], device=mask.device)
    in_image = torch.zeros_like(tokens, dtype=torch.bool)
    in_image[: len(is_image)] = is_image
    is_later = in_image.cumsum(0) > 0
    is_cut = (in_image | ~is_later)[:, None] & is_later & (tokens[:, None] != tokens)
    return mask.masked_fill(is_cut, mask_values(mask.dtype)[1])


def decode_under(decoder: nn.Module, masks: Masks) -> AbstractContextManager[None]:
    """Give a decoder these masks instead of its own while the context is open."""
    return with_arguments(decoder, lambda _: {"attention_mask": masks})


def as_list(masks: Masks) -> list[Tensor]:
    """Return the masks of all kinds of layers."""
    if isinstance(masks, dict):
        return list(masks.values())
    return [masks]


def last_row(masks: Masks) -> Masks:
    """Return the masks of the last query."""
    if isinstance(masks, dict):
        return {kind: mask[:, :, -1:] for kind, mask in masks.items()}
    return masks[:, :, -1:]
