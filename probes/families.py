"""MLLM families: where each keeps its encoder, adapter and LLM, and how it wants an image.

A family is one entry. The encoder's states are what enters the adapter, the adapter's what the LLM is given at the
image positions, both read off the model's own forward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedConfig, PreTrainedModel

from llava_bidir.modeling import LlavaBidirForConditionalGeneration, build_mask, image_attention

__all__ = ["FAMILIES", "Family", "build_mask", "family_of", "image_attention_of"]


@dataclass(frozen=True)
class Family:
    """How to read one kind of model.

    Args:
        model_class: Loads a checkpoint without executing code found in it.
        adapter: The module from encoder states to LLM inputs.
        language_model: The decoder, with `layers` and `norm`.
        image_features: Runs encoder and adapter on pixels f[B, 3, H, W] and returns the adapter's f[B, T, d].
        grid: Image tokens down and across.
        image_px: Side of the square input in pixels.
        seen_px: Of it, what the patches cover from the left and the top.
        encoder_width: Width of the encoder's states.
    """

    model_class: type[PreTrainedModel]
    adapter: Callable[[PreTrainedModel], nn.Module]
    language_model: Callable[[PreTrainedModel], nn.Module]
    image_features: Callable[[PreTrainedModel, Tensor], Tensor]
    grid: Callable[[PreTrainedConfig], tuple[int, int]]
    image_px: Callable[[PreTrainedConfig], int]
    seen_px: Callable[[PreTrainedConfig], int]
    encoder_width: Callable[[PreTrainedConfig], int]


def _llava_grid(config: PreTrainedConfig) -> tuple[int, int]:
    side = _llava_image_px(config) // config.vision_config.patch_size
    return side, side


def _llava_image_px(config: PreTrainedConfig) -> int:
    """Input side of a LLaVA: the encoder's own, unless the number of image tokens says that it was changed."""
    vision = config.vision_config
    side = round(config.image_seq_length**0.5)
    return vision.image_size if side == vision.image_size // vision.patch_size else side * vision.patch_size


def _llava(model_class: type[PreTrainedModel]) -> Family:
    return Family(
        model_class=model_class,
        adapter=lambda model: model.model.multi_modal_projector,
        language_model=lambda model: model.model.language_model,
        image_features=lambda model, pixels: torch.stack(list(model.model.get_image_features(pixels).pooler_output)),
        grid=_llava_grid,
        image_px=_llava_image_px,
        seen_px=lambda config: _llava_grid(config)[0] * config.vision_config.patch_size,
        encoder_width=lambda config: config.vision_config.hidden_size,
    )


FAMILIES: dict[str, Family] = {
    "llava_bidir": _llava(LlavaBidirForConditionalGeneration),
    "llava": _llava(LlavaForConditionalGeneration),
}


def family_of(config: PreTrainedConfig) -> Family:
    """The entry for a checkpoint's config; the error lists what there is."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"no MLLM family {config.model_type!r}; registered: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def image_attention_of(config: PreTrainedConfig, override: str | None = None) -> str:
    """The mask that a model runs under: its own (a stock LLaVA's is causal), or another registered one."""
    name = override or getattr(config, "image_attention", "causal")
    image_attention(name)
    return name
