"""Bare vision encoders as families: the facts of llava_bidir's table, and what all of them have in common.

An encoder has no LLM, no adapter and no prompt. Its sites are "layer_00", the input of its first layer (patch
embeddings with their positions), "layer_01" ... (outputs of the layers) and "final_norm", the last layer after the norm
that the model applies to it; CLIP applies it to the CLS token only, and here it is applied to all patches.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from llava_bidir.common import encoders
from llava_bidir.common.encoders import EncoderKind, square_side, vision_config
from llava_bidir.common.errors import UserError
from llava_bidir.common.images import check_image_px
from probes.models.sites import FINAL_NORM, layer_site

from .base import Family, module_at

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class EncoderFamily(EncoderKind):
    """How to probe one kind of vision encoder.

    Args:
        image_resize: How images become squares; None: as the checkpoint's image processor does.
        normalisations: Keys of mean and standard deviation in the image processor.
    """

    image_resize: str | None = None
    normalisations: tuple[tuple[str, str], ...] = (("image_mean", "image_std"),)

    has_llm = False
    parts = ("encoder",)  # that can be random
    layers_part = "encoder"  # the part that has the layers
    image_attention = "bidirectional"  # every patch attends to every other one

    def with_side(self, image_px: int, config: PreTrainedConfig) -> "EncoderFamily":
        """Return this family for another side of the square input.

        Raises:
            UserError: The side is no multiple of the patch, or the positions are not interpolated.
        """
        vision = vision_config(config)
        default_px = self.image_px(vision)
        if not self.any_side and image_px != default_px:
            raise UserError(
                f"--model.image_px {image_px}: {config.model_type} takes {default_px} px only, because its positions "
                "are not interpolated; leave the option out"
            )
        check_image_px(image_px, square_side(vision.patch_size), "--model.image_px")
        return replace(self, image_px=lambda config: image_px)

    def side_px(self, config: PreTrainedConfig) -> int:
        """Return the side of the square input in pixels."""
        return self.image_px(vision_config(config))

    def grid(self, config: PreTrainedConfig) -> tuple[int, int]:
        """Return the rows and columns of patches."""
        side = self.side_px(config) // square_side(vision_config(config).patch_size)
        return side, side

    def covered_px(self, config: PreTrainedConfig) -> int:
        """Return the part of the input side that the patches cover, from the left and the top."""
        return self.grid(config)[0] * square_side(vision_config(config).patch_size)

    def sites(self, config: PreTrainedConfig) -> list[str]:
        """Return all sites in forward order."""
        layers = [layer_site(i) for i in range(vision_config(config).num_hidden_layers + 1)]
        if not self.norm:
            return layers
        return [*layers, FINAL_NORM]

    def widths(self, config: PreTrainedConfig) -> dict[str, int]:
        """Return the width of the states at each site."""
        return dict.fromkeys(self.sites(config), vision_config(config).hidden_size)

    def sizes(self, config: PreTrainedConfig) -> dict[str, int]:
        """Return the numbers of a config that must be 1 or more, by what they are."""
        vision = vision_config(config)
        return {"layers": vision.num_hidden_layers, "width": vision.hidden_size}

    def layers_of(self, model: "PreTrainedModel") -> nn.ModuleList:
        """Return the layers of a model."""
        return module_at(model, self.layers)

    def norm_of(self, model: "PreTrainedModel") -> nn.Module:
        """Return the norm after the last layer of a model."""
        return module_at(model, self.norm)

    def random_modules(self, model: "PreTrainedModel", match: str) -> dict[str, list[nn.Module]]:
        """Return the modules that random weights replace, by part; patch embeddings and final norm stay trained."""
        return {"encoder": [self.layers_of(model)]}


AnyFamily = Family | EncoderFamily


def family_of_kind(kind: EncoderKind) -> EncoderFamily:
    """Return the family of a kind of encoder."""
    return EncoderFamily(**vars(kind))


ENCODERS = {name: family_of_kind(kind) for name, kind in encoders.ENCODERS.items()}
