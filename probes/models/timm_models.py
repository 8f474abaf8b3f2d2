"""Models of timm: "timm:NAME" with its published weights, "timm:local-dir:DIR" with those of a folder."""

import math
from fractions import Fraction
from importlib.util import find_spec

from PIL import Image
from torch import nn

from llava_bidir.common.errors import UserError, error_context
from probes.ops.geometry import ResizeRule

from .own_module import EncoderModule

BLOCKS = "blocks"
# what a block adds, after any layer scale
BLOCK_PARTS = {"attn": "drop_path1", "mlp": "drop_path2"}
NORMS = ("norm", "fc_norm")  # the second where patches are averaged before it


def load_timm(name: str, image_px: int | None = None) -> EncoderModule:
    """Return a vision transformer of timm with its weights.

    Args:
        name: As `timm.create_model` has it, e.g. "vit_small_patch14_dinov2", or "local-dir:DIR" of a folder that timm
            has written. No code of a model is run, and no pickles are loaded.
        image_px: Side of the square input; None for the one of the weights. timm interpolates positions.

    Raises:
        UserError: timm is not installed, has no such model or weights, or the model is none of equal layers.
    """
    if find_spec("timm") is None:
        raise UserError("timm is not installed; run: pip install 'llava-bidir[timm]'")
    import timm

    with error_context(f"timm:{name}"):
        settings = {}
        if image_px is not None:
            settings = {"img_size": image_px}
        model = timm.create_model(name, pretrained=True, **settings)
        config = timm.data.resolve_model_data_config(model)
        if not hasattr(model, BLOCKS) or not hasattr(model, "patch_embed"):
            raise UserError(
                f"a {type(model).__name__} has no {BLOCKS} of one grid; expected a vision transformer"
            )
        rows, columns = model.patch_embed.grid_size
        if rows != columns:
            raise UserError(
                f"its input is {rows} x {columns} patches; expected a square. Give its side by image_px"
            )
    side_px = model.patch_embed.img_size[0]
    norms = [getattr(model, name, nn.Identity()) for name in NORMS]
    used = [name for name, norm in zip(NORMS, norms, strict=True) if [*norm.parameters()]]
    parts = {}
    if all(hasattr(block, path) for block in model.blocks for path in BLOCK_PARTS.values()):
        parts = BLOCK_PARTS
    return EncoderModule(
        model,
        preprocess=(config["mean"], config["std"]),
        patch=model.patch_embed.patch_size[0],
        layers=BLOCKS,
        norm=next(iter(used), None),
        parts=parts,
        image_px=side_px,
        resize_rule=_resize_rule(config, side_px),
    )


def _resize_rule(config: dict, side: int) -> ResizeRule:
    """Return how timm's own transform makes squares (timm/data/transforms_factory.py), by its data config."""
    names = {filter.name.lower(): filter for filter in Image.Resampling}
    resample = names.get(config["interpolation"], Image.Resampling.BICUBIC)
    before = math.floor(side / config["crop_pct"])
    way = "center_crop"
    if config["crop_mode"] == "squash":
        way = "squash"
    return ResizeRule(way, resample, Fraction(before, side))
