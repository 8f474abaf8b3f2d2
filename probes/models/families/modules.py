"""The family of modules that are of no class of transformers: one's own, and those of timm.

Their config has no file: it is made when the module is described (own_module.py), so this family only reads it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig

from llava_bidir.common.images import check_image_px

from .base import module_at
from .encoders import EncoderFamily

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

MODULE_TYPE = "module"  # of their configs


class ModuleConfig(PreTrainedConfig):
    """What is known of a module.

    Attributes:
        image_size: Side of the square input in pixels.
        patch_size: Side of a patch in pixels.
        layer_names: Paths of the layers in the module, in forward order.
        norm_name: Path of the norm after them; None if it has none, and then no site "final_norm".
        extra_tokens: Number of tokens before the patches.
        site_widths: Width of the states at each site.
        has_parts: True if it is said which modules of the layers are attention and MLP.
    """

    model_type = MODULE_TYPE

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layer_names)

    @property
    def hidden_size(self) -> int:
        """Width of the last site."""
        return self.site_widths[-1]


def why_no_parts(config: PreTrainedConfig) -> str:
    """Return why attention and MLP of the layers are not known, "" if they are."""
    if config.model_type != MODULE_TYPE or config.has_parts:
        return ""
    return "this module does not say its `parts` (attn, mlp)"


def why_unmatched(config: PreTrainedConfig) -> str:
    """Return why random layers cannot be matched to the trained ones, "" if they can as far as a config says."""
    why = why_no_parts(config)
    return why and f"random layers cannot be matched to the trained ones: {why}"


class ModuleFamily(EncoderFamily):
    """How to read a module by its measured config; the model is a :class:`probes.models.own_module.ModuleModel`."""

    def with_side(self, image_px: int, config: PreTrainedConfig) -> "ModuleFamily":
        """Return this family for another side; whether the module takes it shows when it is loaded."""
        check_image_px(image_px, config.patch_size, "--model.image_px")
        return replace(self, image_px=lambda config: image_px)

    def sites(self, config: PreTrainedConfig) -> list[str]:
        """Return all sites in forward order."""
        sites = super().sites(config)
        if not config.norm_name:
            return sites[:-1]
        return sites

    def widths(self, config: PreTrainedConfig) -> dict[str, int]:
        """Return the width of the states at each site."""
        return dict(zip(self.sites(config), config.site_widths, strict=True))

    def layers_of(self, model: "PreTrainedModel") -> nn.ModuleList:
        """Return the layers of a module."""
        return nn.ModuleList(module_at(model.module, name) for name in model.config.layer_names)

    def norm_of(self, model: "PreTrainedModel") -> nn.Module:
        """Return the norm after the last layer."""
        return module_at(model.module, model.config.norm_name)


MODULE_FAMILY = ModuleFamily(
    "PreTrainedModel", layers="", norm="norm_name", extra_keys=("extra_tokens",)
)
