"""Bare vision encoders: one entry per model type, and what all of them have in common.

An encoder has no LLM, no adapter and no prompt. Its sites are "layer_00", the input of its first layer (patch
embeddings with their positions), "layer_01" ... (outputs of the layers) and "final_norm", the last layer after the norm
that the model applies to it; CLIP applies it to the CLS token only, and here it is applied to all patches.

Two-tower checkpoints (CLIP, SigLIP) are read as their vision model. Shapes: B images, T patches, p side of a patch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import check_image_px
from probes.models.sites import FINAL_NORM, layer_site

from .base import Family, cut_patches, find_model_class, module_at, square_side

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the vision model, also of a two-tower checkpoint."""
    return getattr(config, "vision_config", config)


def stored_side(config: PreTrainedConfig) -> int:
    """Return the side in pixels that a checkpoint's positions are stored for."""
    return square_side(config.image_size)


def shorter_side(config: PreTrainedConfig) -> int:
    """Return the shorter side of an input that is no square; Sapiens is published at 1024 x 768 px."""
    if isinstance(config.image_size, int):
        return config.image_size
    return min(config.image_size)


def published_side(config: PreTrainedConfig) -> int:
    """Return the side at which DINOv2 is published and evaluated, 224 px; its positions are stored for 518 px."""
    return min(224, stored_side(config))


def stored_grid_side(config: PreTrainedConfig) -> int:
    """Return the side in pixels of the grid of SigLIP 2's stored positions."""
    return round(config.num_patches**0.5) * square_side(config.patch_size)


def plain_inputs(config: PreTrainedConfig, pixels: Tensor) -> dict:
    """Return the inputs of a model that fits its positions to the pixels by itself."""
    return {"pixel_values": pixels}


def interpolating_inputs(config: PreTrainedConfig, pixels: Tensor) -> dict:
    """Return the inputs of a model that has to be asked to interpolate its positions."""
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def unmasked_inputs(config: PreTrainedConfig, pixels: Tensor) -> dict:
    """Return the inputs of ViT-MAE, which orders the patches by noise: here as they are; `settings` keep them all."""
    rows, columns = (side // square_side(config.patch_size) for side in pixels.shape[-2:])
    order = torch.arange(rows * columns, device=pixels.device)
    return interpolating_inputs(config, pixels) | {"noise": order.expand(len(pixels), -1)}


def patch_inputs(config: PreTrainedConfig, pixels: Tensor) -> dict:
    """Return the inputs of SigLIP 2: the pixels of each patch f[B, T, p * p * 3], none of which is padding."""
    patch = square_side(config.patch_size)
    rows, columns = (side // patch for side in pixels.shape[-2:])
    pixels = pixels[:, :, : rows * patch, : columns * patch]
    patches = cut_patches(pixels, patch).movedim(3, -1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(
            patches.shape[:2], dtype=torch.long, device=pixels.device
        ),
        "spatial_shapes": torch.tensor([[rows, columns]] * len(pixels), device=pixels.device),
    }


@dataclass(frozen=True)
class EncoderFamily:
    """How to read one kind of vision encoder. Modules are named by their path in the model.

    Functions receive the config of the vision model.

    Args:
        model_class: Name of a transformers class, or MODULE:NAME of another one, or a class.
        layers: The list of layers; each has its attention as `attention` or `self_attn`.
        norm: The norm after the last layer; None if there is none, and then no site "final_norm".
        extra_tokens: Number of tokens before the patches.
        extra_keys: Keys of the config with numbers of further ones.
        image_px: Side of the square input in pixels, unless a user chooses another one.
        inputs: (config, pixels f[B, 3, H, W]) -> arguments of the forward.
        any_side: True if positions are interpolated, so that the side can be any multiple of the patch.
        image_resize: How images become squares; None: as the checkpoint's image processor does.
        normalisations: Keys of mean and standard deviation in the image processor.
        settings: What the checkpoint's config is replaced by, by key.
    """

    model_class: "str | type[PreTrainedModel]"
    layers: str
    norm: str | None
    extra_tokens: int = 0
    extra_keys: tuple[str, ...] = ()
    image_px: Callable[[PreTrainedConfig], int] = stored_side
    inputs: Callable[[PreTrainedConfig, Tensor], dict] = plain_inputs
    any_side: bool = True
    image_resize: str | None = None
    normalisations: tuple[tuple[str, str], ...] = (("image_mean", "image_std"),)
    settings: Mapping[str, Any] = field(default_factory=dict)

    has_llm = False
    parts = ("encoder",)  # that can be random
    layers_part = "encoder"  # the part that has the layers
    image_attention = "bidirectional"  # every patch attends to every other one

    @property
    def model_cls(self) -> "type[PreTrainedModel]":
        """Class of the model."""
        return find_model_class(self.model_class)

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


def count_extra_tokens(entry: Any, config: PreTrainedConfig) -> int:
    """Return the number of tokens before the patches, of an entry with `extra_tokens` and `extra_keys`."""
    return entry.extra_tokens + sum(getattr(config, key) for key in entry.extra_keys)


_REGISTERS = ("num_register_tokens",)
_DINOV2 = {"layers": "encoder.layer", "norm": "layernorm", "image_px": published_side}
_TOWER = {"layers": "encoder.layers", "norm": "post_layernorm"}
_BLOCKS = {"layers": "encoder.layer", "norm": "layernorm"}
_VIT = {"layers": "layers", "norm": "layernorm", "inputs": interpolating_inputs}

_CLIP = EncoderFamily("CLIPVisionModel", extra_tokens=1, inputs=interpolating_inputs, **_TOWER)
_SIGLIP = EncoderFamily("SiglipVisionModel", extra_tokens=0, inputs=interpolating_inputs, **_TOWER)
_SIGLIP2 = EncoderFamily(
    "Siglip2VisionModel", extra_tokens=0, image_px=stored_grid_side, inputs=patch_inputs, **_TOWER
)
_METACLIP_2 = EncoderFamily(
    "MetaClip2VisionModel", extra_tokens=1, inputs=interpolating_inputs, **_TOWER
)
_TIPSV2 = EncoderFamily("Tipsv2VisionModel", extra_tokens=1, extra_keys=_REGISTERS, **_BLOCKS)
ENCODERS: dict[str, EncoderFamily] = {
    "dinov2": EncoderFamily("Dinov2Model", extra_tokens=1, **_DINOV2),
    "dinov2_with_registers": EncoderFamily(
        "Dinov2WithRegistersModel", extra_tokens=1, extra_keys=_REGISTERS, **_DINOV2
    ),
    "dinov3_vit": EncoderFamily(
        "DINOv3ViTModel", layers="model.layer", norm="norm", extra_tokens=1, extra_keys=_REGISTERS
    ),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "vit": EncoderFamily("ViTModel", extra_tokens=1, **_VIT),
    "ijepa": EncoderFamily("IJepaModel", extra_tokens=0, **_VIT),
    "deit": EncoderFamily("DeiTModel", extra_tokens=2, **_VIT),
    "vit_msn": EncoderFamily("ViTMSNModel", extra_tokens=1, **_VIT),
    "vit_mae": EncoderFamily(
        "ViTMAEModel",
        extra_tokens=1,
        settings={"mask_ratio": 0.0},
        **_VIT | {"inputs": unmasked_inputs},
    ),
    "beit": EncoderFamily("BeitModel", extra_tokens=1, **_VIT),
    "data2vec-vision": EncoderFamily(
        "Data2VecVisionModel", extra_tokens=1, inputs=interpolating_inputs, **_BLOCKS
    ),
    "pixio": EncoderFamily(
        "PixioModel", extra_keys=("n_cls_tokens",), **_VIT | {"inputs": plain_inputs}
    ),
    "metaclip_2": _METACLIP_2,
    "metaclip_2_vision_model": _METACLIP_2,
    # of the model with two towers, transformers would draw the vision tower at random
    "aimv2_vision_model": EncoderFamily(
        "Aimv2VisionModel", layers="encoder.layers", norm="rms_norm", extra_tokens=0, any_side=False
    ),
    "mlcd_vision_model": EncoderFamily("MLCDVisionModel", extra_tokens=1, any_side=False, **_TOWER),
    "tipsv2": _TIPSV2,
    "tipsv2_vision_model": _TIPSV2,
    "radio": EncoderFamily(
        "RadioModel",
        layers="encoder.layer",
        norm=None,
        extra_keys=("num_cls_tokens", "num_registers"),
    ),
    "sapiens2": EncoderFamily(
        "Sapiens2Model",
        layers="model.layer",
        norm="norm",
        extra_tokens=1,
        extra_keys=_REGISTERS,
        image_px=shorter_side,
    ),
}
