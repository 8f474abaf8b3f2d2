"""The entry of a family. Everything else about a model is read from its own forward."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.encoders import cut_patches as cut_patches
from llava_bidir.common.encoders import find_model_class
from llava_bidir.common.encoders import square_side as square_side
from llava_bidir.common.errors import UserError
from probes.models.sites import ENCODER, site_names

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel


def image_size(config: PreTrainedConfig) -> int:
    """Return the input side of the encoder in pixels."""
    return square_side(config.vision_config.image_size)


def patch_size(config: PreTrainedConfig) -> int:
    """Return the patch side of the encoder in pixels."""
    return square_side(config.vision_config.patch_size)


@dataclass(frozen=True)
class Family:
    """How to read one kind of model. Modules are named by their path in `model.model`.

    The model's own forward runs on the ids of prefix and image with its own position ids.

    Args:
        model_class: Name of a transformers class, or MODULE:NAME of another one, or a class.
        image_px: Side of the square input in pixels, from the config.
        token_px: Side of the square that one image token covers in pixels: the patch, or the patches merged into it.
        encoder_width: Width of the encoder states.
        adapter: Modules from encoder states to LLM inputs, in order; re-initialised by "untrained".
        encoder_output_module: Module whose input is the encoder output. If patches are merged before the first linear
            layer of the adapter, it is that layer: states are then on the LLM's grid, merged patches concatenated.
            None: the first module of `adapter`.
        encoder_states: (model, arguments of that module) -> states f[B x T, width], or a tensor that reshapes to it, in
            raster order.
        inputs: (model, pixels f[B, C, H, W], is_image bool[B, N]) -> arguments of the forward besides the ids.
        language_model: The decoder, with `layers`, the norm after them, and `embed_tokens`.
        norm: Name of that norm in the decoder.
        vision_tower: The encoder, whose layers are sites, too (encoder_layers.py); None if there is none, or two.
        image_attention: Mask that checkpoints were trained with, as a name or from the config.
        image_resize: How images become squares; None: as the checkpoint's image processor does.
        normalisations: Keys of mean and standard deviation in the image processor; 3 channels for each pair.
        placeholder: The image in the chat template.
        image_start_text: Text that the processor inserts before the first image token.
        image_end_text: Text that the processor inserts after the last image token.
        own_template: Chat template of a family whose checkpoints have none, and whose image comes before all text.
        row_separator: Token between rows of image tokens, if any. Its states are not returned.
        rows_share_encoder: False if layers of the LLM receive more of an image than the states of its tokens, such as
            position ids; rows of a knockout then run the encoder, too.
        question_in_prefix: True if the question is a part of the block of the mask "prefix".
        incomplete_sites: Number of sites, from "adapter" on, after which features of the image enter the LLM beside the
            states there. These states cannot be replaced.
    """

    model_class: "str | type[PreTrainedModel]"
    image_px: Callable[[PreTrainedConfig], int] = image_size
    token_px: Callable[[PreTrainedConfig], int | Fraction] = patch_size
    encoder_width: Callable[[PreTrainedConfig], int] = lambda config: (
        config.vision_config.hidden_size
    )
    adapter: tuple[str, ...] = ("multi_modal_projector",)
    encoder_output_module: str | None = None
    encoder_states: "Callable[[PreTrainedModel, tuple], Tensor]" = lambda model, args: args[0]
    inputs: "Callable[[PreTrainedModel, Tensor, Tensor], dict]" = lambda model, pixels, is_image: {
        "pixel_values": pixels
    }
    language_model: str = "language_model"
    norm: str = "norm"
    vision_tower: str | None = "vision_tower"
    image_attention: str | Callable[[PreTrainedConfig], str] = "causal"
    image_resize: str | None = "squash"
    normalisations: tuple[tuple[str, str], ...] = (("image_mean", "image_std"),)
    placeholder: str = "<image>"
    image_start_text: str = ""
    image_end_text: str = ""
    own_template: str | None = None
    row_separator: str | None = None
    rows_share_encoder: bool = True
    question_in_prefix: bool = False
    incomplete_sites: Callable[[PreTrainedConfig], int] = lambda config: 0

    has_llm = True
    parts = ("adapter", "llm")  # that can be random
    layers_part = "llm"  # the part that has the layers

    @property
    def model_cls(self) -> "type[PreTrainedModel]":
        """Class of the model; loads a checkpoint without executing code in it."""
        return find_model_class(self.model_class)

    def grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Return the rows and columns of image tokens."""
        side = self.image_px(config) // self.token_px(config)
        return side, side

    def with_side(self, image_px: int, config: PreTrainedConfig) -> "Family":
        """Raise a UserError: the side is part of a checkpoint with an LLM."""
        raise UserError(
            f"--model.image_px {image_px}: {config.model_type} has an LLM, whose checkpoint says how many image tokens "
            "it reads; train it at this side with `llava-bidir fit --model.encoder.image_px`"
        )

    def side_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square input in pixels."""
        return self.image_px(config)

    def sites(self, config: PreTrainedConfig) -> list[str]:
        """Return all sites in forward order."""
        return site_names(config.get_text_config().num_hidden_layers)

    def widths(self, config: PreTrainedConfig) -> dict[str, int]:
        """Return the width of the states at each site."""
        width = config.get_text_config().hidden_size
        return dict.fromkeys(self.sites(config), width) | {ENCODER: self.encoder_width(config)}

    def sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """Return the numbers of a config that must be 1 or more, by what they are."""
        text_config = config.get_text_config()
        return {
            "layers of the LLM": text_config.num_hidden_layers,
            "width of the LLM": text_config.hidden_size,
            "width of the encoder": self.encoder_width(config),
        }

    def covered_px(self, config: PreTrainedConfig) -> int:
        """Return the part of the input side that the tokens cover, from the left and the top."""
        return int(self.grid(config)[0] * self.token_px(config))

    def decoder_of(self, model: "PreTrainedModel") -> nn.Module:
        """Return the decoder of a model."""
        return module_at(model, self.language_model, "model")

    def norm_of(self, model: "PreTrainedModel") -> nn.Module:
        """Return the norm after the decoder's last layer."""
        return module_at(model, f"{self.language_model}.{self.norm}", "model")

    def encoder_output_of(self, model: "PreTrainedModel") -> nn.Module:
        """Return the module of a model whose input is the encoder output."""
        return module_at(model, self.encoder_output_module or self.adapter[0], "model")

    def random_modules(self, model: "PreTrainedModel", match: str) -> dict[str, list[nn.Module]]:
        """Return the modules that random weights replace, by part; matched LLMs keep all but their layers."""
        llm = self.decoder_of(model)
        if match != "none":
            llm = llm.layers
        adapter = [module_at(model, path, "model") for path in self.adapter]
        return {"adapter": adapter, "llm": [llm]}


def module_at(model: nn.Module, path: str, within: str = "") -> nn.Module:
    """Return the module at a path in a model, or `within` a module of it.

    Raises:
        UserError: There is none; the message lists the existing modules.
    """
    module = model
    if within:
        module = getattr(model, within)
    parent = within or type(model).__name__
    for name in path.split("."):
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            names = ", ".join(name for name, _ in module.named_children()) or "no modules"
            raise UserError(
                f"{type(model).__name__} has no module {path!r}, which its family names; {parent} has {names}"
            )
        module = child
        parent = f"{parent}.{name}"
    return module
