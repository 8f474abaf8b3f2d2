"""Tiny random vision encoders of the real classes, as checkpoints on disk, and the inputs of their stock forward."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, CLIPImageProcessorPil

PATCH_PX = 4
STORED_PX = 24
MEAN = [0.5, 0.4, 0.3]
STD = [0.5, 0.6, 0.7]
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": PATCH_PX,
    "image_size": STORED_PX,
    # of some kinds; the others leave them out
    "layerscale_value": 0.5,
    "layer_scale_init_value": 0.7,
    "use_relative_position_bias": True,
    "num_register_tokens": 2,
    "num_registers": 2,
    "num_cls_tokens": 3,
    "n_cls_tokens": 3,
    "num_patches": 36,
    "num_key_value_attention_heads": 1,
    "max_img_size": 64,
    "mask_ratio": 0.0,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def whole(pixels: Tensor) -> dict:
    """Return the inputs of a model that fits its positions by itself."""
    return {"pixel_values": pixels}


def interpolated(pixels: Tensor) -> dict:
    """Return the inputs of a model that interpolates on request."""
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def in_order(pixels: Tensor) -> dict:
    """Return the inputs of ViT-MAE: noise that leaves patches where they are."""
    patches = (pixels.shape[-1] // PATCH_PX) ** 2
    noise = torch.linspace(0, 1, patches).expand(len(pixels), -1)
    return interpolated(pixels) | {"noise": noise}


def cut(pixels: Tensor, side: int) -> list[Tensor]:
    """Return the patches of images in raster order, cut out one by one, f[B, C, side, side]."""
    rows, columns = (range(0, length, side) for length in pixels.shape[2:])
    return [pixels[:, :, y : y + side, x : x + side] for y in rows for x in columns]


def rows_of_pixels(patches: list[Tensor]) -> Tensor:
    """Return each patch as rows of pixels with their channels, f[B, patches, side * side * C]."""
    return torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], 1)


def patchified(pixels: Tensor) -> dict:
    """Return the inputs of SigLIP 2."""
    patches = rows_of_pixels(cut(pixels, PATCH_PX))
    grid = [side // PATCH_PX for side in pixels.shape[2:]]
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": torch.tensor([grid] * len(pixels)),
    }


@dataclass(frozen=True)
class StockEncoder:
    """What is known of an encoder without the package.

    Args:
        model_type: That of the config on disk.
        vision_class: The vision model in transformers.
        extra_tokens: Tokens before the patches.
        inputs: Normalised pixels -> arguments of the stock forward.
        settings: Further settings of the vision config.
        two_towers: The checkpoint on disk has a text model, too.
        normed: The stock `last_hidden_state` is after the final norm.
        has_norm: There is a final norm.
        one_side: Positions are not interpolated.
        has_own_attention: It attends in code of its own, which takes no mask.
    """

    model_type: str
    vision_class: str
    extra_tokens: int = 0
    inputs: Callable[[Tensor], dict] = whole
    settings: dict = field(default_factory=dict)
    two_towers: bool = False
    normed: bool = True
    has_norm: bool = True
    one_side: bool = False
    has_own_attention: bool = False

    def write(self, folder: Path) -> str:
        """Write a checkpoint with its image processor, and return its path."""
        settings = VISION | self.settings
        if self.two_towers:
            settings = {"vision_config": settings, "text_config": TEXT, "projection_dim": 16}
        config = AutoConfig.for_model(self.model_type, **settings)
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(config) if self.two_towers else self.cls(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # else layers hardly change the states
                if parameter.ndim > 1 and "norm" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"height": STORED_PX, "width": STORED_PX},
            do_center_crop=False,
            image_mean=MEAN,
            image_std=STD,
        ).save_pretrained(folder)
        return str(folder)

    @property
    def cls(self) -> type:
        """Class of the vision model."""
        return getattr(transformers, self.vision_class)


_ALL = [
    StockEncoder("dinov2", "Dinov2Model", 1),
    StockEncoder("dinov2_with_registers", "Dinov2WithRegistersModel", 3),
    StockEncoder("dinov3_vit", "DINOv3ViTModel", 3),
    StockEncoder("clip_vision_model", "CLIPVisionModel", 1, interpolated, normed=False),
    StockEncoder("metaclip_2_vision_model", "MetaClip2VisionModel", 1, interpolated, normed=False),
    StockEncoder(
        model_type="siglip_vision_model",
        vision_class="SiglipVisionModel",
        extra_tokens=0,
        inputs=interpolated,
    ),
    StockEncoder(
        model_type="siglip2_vision_model",
        vision_class="Siglip2VisionModel",
        extra_tokens=0,
        inputs=patchified,
    ),
    StockEncoder(model_type="vit", vision_class="ViTModel", extra_tokens=1, inputs=interpolated),
    StockEncoder(
        model_type="ijepa", vision_class="IJepaModel", extra_tokens=0, inputs=interpolated
    ),
    StockEncoder(model_type="deit", vision_class="DeiTModel", extra_tokens=2, inputs=interpolated),
    StockEncoder(
        model_type="vit_msn", vision_class="ViTMSNModel", extra_tokens=1, inputs=interpolated
    ),
    StockEncoder(model_type="vit_mae", vision_class="ViTMAEModel", extra_tokens=1, inputs=in_order),
    StockEncoder(model_type="beit", vision_class="BeitModel", extra_tokens=1, inputs=interpolated),
    StockEncoder("data2vec-vision", "Data2VecVisionModel", 1, interpolated, has_own_attention=True),
    StockEncoder("pixio", "PixioModel", 3),
    StockEncoder("aimv2_vision_model", "Aimv2VisionModel", one_side=True),
    StockEncoder("mlcd_vision_model", "MLCDVisionModel", 1, normed=False, one_side=True),
    StockEncoder("tipsv2_vision_model", "Tipsv2VisionModel", 3),
    StockEncoder("radio", "RadioModel", 5, has_norm=False),
    StockEncoder("sapiens2", "Sapiens2Model", 3, settings={"image_size": [32, 24]}),
]
STOCK = {stock.model_type: stock for stock in _ALL}
for _name in ("clip", "metaclip_2", "siglip", "siglip2", "tipsv2"):
    _stock = STOCK[f"{_name}_vision_model"]
    STOCK[_name] = replace(_stock, model_type=_name, two_towers=True)
