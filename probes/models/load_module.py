"""Load a module as a frozen vision encoder: one's own, or one of timm."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llava_bidir.common.errors import UserError
from probes.ops.geometry import RESIZES, ResizeRule

from .families import family_of
from .frozen_encoder import FrozenEncoder
from .measured_preprocess import PHOTO
from .module_sources import open_source
from .own_module import EncoderModule, describe_module


def load_module(
    module: nn.Module | EncoderModule | str,
    described: Mapping[str, Any],
    dtype: torch.dtype | str | None,
    image_px: int | None,
    image_resize: str | None,
    of_checkpoints: Mapping[str, Any],
) -> FrozenEncoder:
    """Return a module as a frozen encoder, on the CPU or where it is.

    Args:
        module: A module, one with its description, or the name of a source (module_sources.py).
        described: Further fields of :class:`EncoderModule`, of a module.
        dtype: As in :func:`probes.load`, and so are `image_px` and `image_resize`.
        image_px: Side of the square input in pixels.
        image_resize: How images become squares.
        of_checkpoints: Arguments that a module does not have.

    Raises:
        UserError: What is said of the module is not what it does, or an argument is of checkpoints only.
    """
    if isinstance(module, EncoderModule):
        name = type(module.module).__name__
        check_absent(described, "the EncoderModule says so itself")
        encoder = module if image_px is None else replace(module, image_px=image_px)
    elif isinstance(module, nn.Module):
        name = type(module).__name__
        if missing := [key for key in ("preprocess", "patch", "layers") if described[key] is None]:
            raise UserError(f"to read a module, give {', '.join(missing)}, too")
        encoder = EncoderModule(module, **described, image_px=image_px)
    else:
        name = module
        check_absent(described, f"{name} says so itself")
        encoder = open_source(name, image_px)
    check_absent(of_checkpoints, f"{name} is a module, and no checkpoint of transformers")
    model, processor, measured = describe_module(encoder)
    rule = measured.rule
    if rule is None and image_resize is None:
        raise UserError(
            f"{name}: preprocess makes squares in none of the known ways, so that masks cannot be placed: of a photo "
            f"of {PHOTO[0]} x {PHOTO[1]} px the square shows {measured.shown}. Say how squares are made instead, e.g. "
            f"image_resize='squash'; expected one of {', '.join(RESIZES)}"
        )
    if dtype not in (None, "auto"):
        model = model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    rule = (rule or ResizeRule()).replaced_by(image_resize)
    return FrozenEncoder(model, family_of(model.config), [processor], rule)


def check_absent(arguments: Mapping[str, Any], why: str) -> None:
    """Raise a UserError that ends with `why` if one of these arguments is given."""
    if given := [name for name, value in arguments.items() if value is not None]:
        raise UserError(f"leave out {', '.join(given)}, since {why}")
