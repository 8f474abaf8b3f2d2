"""The table of vision encoders: how to read each kind, for training and for probing.

Two-tower checkpoints (CLIP, SigLIP) are read as their vision model. Shapes: B images, T patches, p side of a patch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from .errors import UserError

if TYPE_CHECKING:  # seconds, which reading a config does not need
    from transformers import PreTrainedModel

# means and standard deviations of pixels
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
UNCHANGED = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))  # of encoders that normalise inside, or not at all


def square_side(size: int | list[int] | tuple[int, ...]) -> int:
    """Return the side of a square that a config specifies by one number or two."""
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise UserError(f"encoder input of {list(size)} px is not supported; expected a square")
    return size[0]


def cut_patches(pixels: Tensor, side: int) -> Tensor:
    """Return the patches of images f[B, C, H, W] in raster order, f[B, h, w, C, side, side]; H and W are multiples."""
    split = pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # B, C, h, side, w, side
    return split.permute(0, 2, 4, 1, 3, 5)


def find_model_class(model_class: "str | type[PreTrainedModel]") -> "type[PreTrainedModel]":
    """Return a class, or the one of a name: of transformers, or MODULE:NAME.

    Raises:
        UserError: The installed transformers has no such class.
    """
    if not isinstance(model_class, str):
        return model_class
    module, _, name = model_class.rpartition(":")
    if module:
        return getattr(import_module(module), name)
    if not hasattr(transformers, model_class):
        raise UserError(f"transformers {transformers.__version__} has no class {model_class!r}")
    return getattr(transformers, model_class)


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
class EncoderKind:
    """How to read one kind of vision encoder. Modules are named by their path in the model.

    Functions receive the config of the vision model.

    Args:
        model_class: Name of a transformers class, or MODULE:NAME of another one, or a class.
        layers: The list of layers; each has its attention as `attention` or `self_attn`.
        norm: The norm after the last layer; None if there is none.
        extra_tokens: Number of tokens before the patches.
        extra_keys: Keys of the config with numbers of further ones.
        image_px: Side of the square input in pixels, unless a user chooses another one.
        inputs: (config, pixels f[B, 3, H, W]) -> arguments of the forward.
        any_side: True if positions are interpolated, so that the side can be any multiple of the patch.
        settings: What the checkpoint's config is replaced by, by key.
        trained_px: Side in training, unless a user chooses another one; None: that of the stored positions.
        pixels: Published mean and standard deviation, of checkpoints without a preprocessor_config.json.
    """

    model_class: "str | type[PreTrainedModel]"
    layers: str
    norm: str | None
    extra_tokens: int = 0
    extra_keys: tuple[str, ...] = ()
    image_px: Callable[[PreTrainedConfig], int] = stored_side
    inputs: Callable[[PreTrainedConfig, Tensor], dict] = plain_inputs
    any_side: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained_px: int | None = None
    pixels: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET

    @property
    def model_cls(self) -> "type[PreTrainedModel]":
        """Class of the model."""
        return find_model_class(self.model_class)


def count_extra_tokens(entry: Any, config: PreTrainedConfig) -> int:
    """Return the number of tokens before the patches, of an entry with `extra_tokens` and `extra_keys`."""
    return entry.extra_tokens + sum(getattr(config, key) for key in entry.extra_keys)


_REGISTERS = ("num_register_tokens",)
# 336 px give CLIP's 24 x 24 grid at 14 px, and 21 x 21 patches of 16 px
_DINOV2 = {
    "layers": "encoder.layer",
    "norm": "layernorm",
    "image_px": published_side,
    "trained_px": 336,
}
_TOWER = {"layers": "encoder.layers", "norm": "post_layernorm"}
_BLOCKS = {"layers": "encoder.layer", "norm": "layernorm"}
_VIT = {"layers": "layers", "norm": "layernorm", "inputs": interpolating_inputs}

_CLIP = EncoderKind(
    "CLIPVisionModel", extra_tokens=1, inputs=interpolating_inputs, pixels=OPENAI, **_TOWER
)
_SIGLIP = EncoderKind(
    "SiglipVisionModel", extra_tokens=0, inputs=interpolating_inputs, pixels=HALF, **_TOWER
)
_SIGLIP2 = EncoderKind(
    "Siglip2VisionModel", extra_tokens=0, image_px=stored_grid_side, inputs=patch_inputs, **_TOWER
)
_METACLIP_2 = EncoderKind(
    "MetaClip2VisionModel", extra_tokens=1, inputs=interpolating_inputs, pixels=OPENAI, **_TOWER
)
_TIPSV2 = EncoderKind(
    "Tipsv2VisionModel", extra_tokens=1, extra_keys=_REGISTERS, pixels=UNCHANGED, **_BLOCKS
)
ENCODERS: dict[str, EncoderKind] = {
    "dinov2": EncoderKind("Dinov2Model", extra_tokens=1, **_DINOV2),
    "dinov2_with_registers": EncoderKind(
        "Dinov2WithRegistersModel", extra_tokens=1, extra_keys=_REGISTERS, **_DINOV2
    ),
    "dinov3_vit": EncoderKind(
        "DINOv3ViTModel",
        layers="model.layer",
        norm="norm",
        extra_tokens=1,
        extra_keys=_REGISTERS,
        trained_px=336,
    ),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "vit": EncoderKind("ViTModel", extra_tokens=1, **_VIT),
    "ijepa": EncoderKind("IJepaModel", extra_tokens=0, **_VIT),
    "deit": EncoderKind("DeiTModel", extra_tokens=2, **_VIT),
    "vit_msn": EncoderKind("ViTMSNModel", extra_tokens=1, **_VIT),
    "vit_mae": EncoderKind(
        "ViTMAEModel",
        extra_tokens=1,
        settings={"mask_ratio": 0.0},
        **_VIT | {"inputs": unmasked_inputs},
    ),
    "beit": EncoderKind("BeitModel", extra_tokens=1, **_VIT),
    "data2vec-vision": EncoderKind(
        "Data2VecVisionModel", extra_tokens=1, inputs=interpolating_inputs, **_BLOCKS
    ),
    "pixio": EncoderKind(
        "PixioModel", extra_keys=("n_cls_tokens",), **_VIT | {"inputs": plain_inputs}
    ),
    "metaclip_2": _METACLIP_2,
    "metaclip_2_vision_model": _METACLIP_2,
    # of the model with two towers, transformers would draw the vision tower at random
    "aimv2_vision_model": EncoderKind(
        "Aimv2VisionModel",
        layers="encoder.layers",
        norm="rms_norm",
        extra_tokens=0,
        any_side=False,
        pixels=OPENAI,
    ),
    "mlcd_vision_model": EncoderKind(
        "MLCDVisionModel", extra_tokens=1, any_side=False, pixels=OPENAI, **_TOWER
    ),
    "tipsv2": _TIPSV2,
    "tipsv2_vision_model": _TIPSV2,
    "radio": EncoderKind(
        "RadioModel",
        layers="encoder.layer",
        norm=None,
        extra_keys=("num_cls_tokens", "num_registers"),
        pixels=UNCHANGED,
    ),
    "sapiens2": EncoderKind(
        "Sapiens2Model",
        layers="model.layer",
        norm="norm",
        extra_tokens=1,
        extra_keys=_REGISTERS,
        image_px=shorter_side,
    ),
}


def register_encoder(model_type: str, kind: EncoderKind) -> None:
    """Add a kind of encoder, so that both packages read checkpoints whose config has this `model_type`.

    Raises:
        UserError: The model type is registered already.
    """
    if model_type in ENCODERS:
        raise UserError(f"encoder {model_type!r} is registered already; choose another model_type")
    ENCODERS[model_type] = kind


def encoder_kind(model_type: str) -> EncoderKind:
    """Return the kind of a vision model's config.

    Raises:
        UserError: It is not registered.
    """
    if model_type not in ENCODERS:
        raise UserError(
            f"unknown encoder {model_type!r}; registered: {', '.join(ENCODERS)}. Add it with "
            "llava_bidir.register_encoder and a llava_bidir.EncoderKind"
        )
    return ENCODERS[model_type]
