"""What a family's entry says. Everything else about a model is read off its own forward."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava_bidir.common.errors import UserError


def _pixels_alone(model: PreTrainedModel, pixels: Tensor, is_image: Tensor) -> dict:
    return {"pixel_values": pixels}


def _first(model: PreTrainedModel, args: tuple) -> Tensor:
    return args[0]


@dataclass(frozen=True)
class Family:
    """How to read one kind of model. Modules are named by their path in `model.model`.

    The model's own forward runs on the ids of prefix and image, under its own position ids; nothing of it is rewritten.

    Args:
        model_class: Name of the transformers class, or a class; loads a checkpoint without executing code found in it.
        image_px: Side of the square input in pixels, from the config.
        token_px: Side of the part of it that one image token of the LLM stands for: the patch, times the patches that
            are merged into a token.
        encoder_width: Width of the encoder's states.
        adapter: The modules from encoder states to LLM inputs, the first of them first: drawn anew by "untrained".
        entry: The module whose input are the encoder's states: the adapter's first linear layer where patches are
            merged before it, so that the encoder is read on the LLM's grid and merged patches are concatenated;
            None is the adapter itself.
        encoder_states: (model, that module's arguments) -> the states, as f[B x T, width] or anything that reshapes to
            it, raster order.
        inputs: (model, pixels f[B, C, H, W], is_image bool[B, N]) -> what the forward takes beside the ids.
        language_model: The decoder, with `layers`, `norm` and an embedding.
        image_attention: The mask that checkpoints of this kind were trained with, by name or from the config.
        normalisations: Which means and standard deviations of the image processor give a set of 3 channels each.
        placeholder: What stands for the image in the chat template; None where an image stands before all text.
        opening: What the processor puts between the template's text and the first image token.
        row_end: The token behind each row of image tokens but the last, if there is one. It is run, not returned.
        shared_prefix: Whether prefix and image may be run one after the other: position ids count tokens, and the
            prefix's inputs do not depend on the image being there.
    """

    model_class: str | type[PreTrainedModel]
    image_px: Callable[[PreTrainedConfig], int]
    token_px: Callable[[PreTrainedConfig], int | Fraction]
    encoder_width: Callable[[PreTrainedConfig], int]
    adapter: tuple[str, ...] = ("multi_modal_projector",)
    entry: str | None = None
    encoder_states: Callable[[PreTrainedModel, tuple], Tensor] = _first
    inputs: Callable[[PreTrainedModel, Tensor, Tensor], dict] = _pixels_alone
    language_model: str = "language_model"
    image_attention: str | Callable[[PreTrainedConfig], str] = "causal"
    normalisations: tuple[tuple[str, str], ...] = (("image_mean", "image_std"),)
    placeholder: str | None = "<image>"
    opening: str = ""
    row_end: str | None = None
    shared_prefix: bool = True

    @property
    def loader(self) -> type[PreTrainedModel]:
        if not isinstance(self.model_class, str):
            return self.model_class
        if not hasattr(transformers, self.model_class):
            raise UserError(f"transformers {transformers.__version__} has no class {self.model_class!r}")
        return getattr(transformers, self.model_class)

    def grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Image tokens down and across."""
        side = self.image_px(config) // self.token_px(config)
        return side, side

    def covered_px(self, config: PreTrainedConfig) -> int:
        """Of the input's side, what the tokens cover from the left and the top."""
        return int(self.grid(config)[0] * self.token_px(config))

    def decoder_of(self, model: PreTrainedModel) -> nn.Module:
        return _module_at(model, self.language_model)

    def adapter_of(self, model: PreTrainedModel) -> list[nn.Module]:
        return [_module_at(model, path) for path in self.adapter]

    def entry_of(self, model: PreTrainedModel) -> nn.Module:
        return _module_at(model, self.entry or self.adapter[0])


def _module_at(model: PreTrainedModel, path: str) -> nn.Module:
    """The module that an entry names; where there is none, the error lists those that there are."""
    found, where = model.model, "model"
    for name in path.split("."):
        inner = getattr(found, name, None)
        if not isinstance(inner, nn.Module):
            there = ", ".join(child for child, _ in found.named_children()) or "no modules"
            raise UserError(
                f"{type(model).__name__} has no module {path!r}, which its family's entry names: {where} has {there}"
            )
        found, where = inner, f"{where}.{name}"
    return found


def side(size: int | list[int] | tuple[int, ...]) -> int:
    """Configs give the size of a square as one number or two."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"an encoder for images of {list(size)} px is not read yet; squares only")
    return size[0]


def image_size(config: PreTrainedConfig) -> int:
    return side(config.vision_config.image_size)


def patch_size(config: PreTrainedConfig) -> int:
    return side(config.vision_config.patch_size)
