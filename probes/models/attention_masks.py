"""The decoder's attention masks, layer by layer: full ones, and those of sliding windows.

Shapes: B images, N tokens of prefix and image.
"""

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError

from .families import build_mask, image_attention

FULL, SLIDING = "full_attention", "sliding_attention"

# masks that are not the same in all kinds of layers: what each kind runs under
BY_KIND = {"bidirectional_sliding": {FULL: "causal", SLIDING: "bidirectional"}}  # Gemma 4's own

Masks = Tensor | dict[str, Tensor]


def kinds_of_layers(text_config: PreTrainedConfig) -> list[str]:
    """Which kinds of attention a decoder has, in order of first use."""
    if getattr(text_config, "layer_types", None):
        return list(dict.fromkeys(text_config.layer_types[: text_config.num_hidden_layers]))
    return [SLIDING if getattr(text_config, "sliding_window", None) else FULL]


def check_name(name: str) -> None:
    """Raises a UserError that lists the masks there are, if there is none of this name."""
    if name not in BY_KIND:
        image_attention(name)


def supports_masks(text_config: PreTrainedConfig) -> bool:
    """Whether all layers of a decoder attend under a mask; linear attention and convolutions do not."""
    return set(kinds_of_layers(text_config)) <= {FULL, SLIDING}


def build_masks(name: str, text_config: PreTrainedConfig, is_image: Tensor, dtype: torch.dtype) -> Masks:
    """What prefix and image attend to, bool[B, 1, N, N] (True = may attend), by kind of layer where there are several.

    A sliding layer looks no further back than its window, image tokens or not. Source: Gemma 3's masks.

    Args:
        name: Registered image attention, or "bidirectional_sliding": in the layers with a sliding window only.
        text_config: Of the decoder.
        is_image: bool[B, N].
        dtype: Of the model.

    Raises:
        UserError: The decoder has layers that take no such mask.
    """
    kinds = kinds_of_layers(text_config)
    if not supports_masks(text_config):
        others = ", ".join(sorted({*kinds} - {FULL, SLIDING}))
        raise UserError(
            f"image_attention {name!r} and knockouts cannot be given to {others} layers: they run under no such mask; "
            "this model can be read as it is, without either"
        )
    if name in BY_KIND and SLIDING not in kinds:
        raise UserError(f"image_attention {name!r} is one of models with sliding windows, which this one has not")
    masks = {}
    for kind in kinds:
        mask = build_mask(BY_KIND.get(name, {}).get(kind, name), text_config, is_image, dtype=dtype)
        if kind == SLIDING:
            mask = mask & torch.ones_like(mask).triu(1 - text_config.sliding_window)
        masks[kind] = mask
    return masks if len(kinds) > 1 else masks[kinds[0]]


def each(masks: Masks) -> list[Tensor]:
    return list(masks.values()) if isinstance(masks, dict) else [masks]


def last_rows(masks: Masks | None, rows: int) -> Masks | None:
    """The masks of the last `rows` queries."""
    if masks is None:
        return None
    if isinstance(masks, dict):
        return {kind: mask[:, :, -rows:] for kind, mask in masks.items()}
    return masks[:, :, -rows:]
