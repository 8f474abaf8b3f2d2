"""The normalisation of a user's preprocessing, measured: photos of one colour tell it, however photos are resized.

Masks are placed by the rule that makes photos squares (`probes/ops/geometry.py`), so that the rule has to be known: it
is the one that makes the same square of a photo of noise.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.ops.geometry import Geometry, ResizeRule

PHOTO = (96, 64)  # width and height of a photo that is no square
FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)
MOST_CROPPED = 1.34  # side before a crop in units of the side after; timm's is 1.14, or less
TOLERANCE = 1e-3  # of normalised values, which are of the size of 1
EXPECTED = (
    "expected (mean, std) of three channels, for pixels of 0 to 1, or a function of a PIL image that returns a tensor "
    "f[3, S, S]"
)


class MeasuredPreprocess(NamedTuple):
    """What a preprocessing does.

    Args:
        mean: Of the channels, for pixels of 0 to 1.
        std: As `mean`.
        side_px: Side of the squares that photos become; None if it does not resize.
        rule: How photos become squares; "squash" if it does not resize, None if it is none of the known rules.
    """

    mean: list[float]
    std: list[float]
    side_px: int | None
    rule: ResizeRule | None


def measure_preprocess(
    preprocess: Callable[[Image.Image], Tensor] | tuple[Sequence[float], Sequence[float]],
) -> MeasuredPreprocess:
    """Return the normalisation of a pair or a function.

    Raises:
        UserError: It is neither, or does more to colours than to shift and scale each channel.
    """
    if not callable(preprocess):
        return MeasuredPreprocess(*_check_pair(preprocess), None, ResizeRule())
    black, white = (_run(preprocess, _plain(value)) for value in (0, 255))
    low, high = (pixels.flatten(1).mean(1) for pixels in (black, white))
    if not (high > low).all():
        raise UserError(
            f"preprocess makes white {high.tolist()} and black {low.tolist()}; expected more for white"
        )
    rows, columns = black.shape[1:]
    resizes = (columns, rows) != PHOTO
    if resizes and rows != columns:
        raise UserError(
            f"preprocess makes {columns} x {rows} px of a photo of {PHOTO[0]} x {PHOTO[1]}; expected a square, or as "
            "many pixels as before"
        )
    colour = (200, 90, 30)
    seen = _run(preprocess, _plain(colour))
    wanted = low + (high - low) * torch.tensor(colour) / 255
    if not torch.allclose(seen, wanted[:, None, None].expand_as(seen), atol=TOLERANCE):
        raise UserError(
            f"preprocess makes {seen.flatten(1).mean(1).tolist()} of the colour {colour}, where its black and white "
            f"mean {wanted.tolist()}; expected each channel shifted and scaled, in the order red, green, blue. Do what "
            "else it does in the module's forward"
        )
    std = 1 / (high - low)
    mean = -low * std

    def scale(photo: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(photo) / np.float32(255)).movedim(-1, 0)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    rule = _find_rule(preprocess, scale, rows if resizes else None)
    if rule is None and not resizes:
        raise UserError(
            "preprocess changes pixels by their neighbours; expected a function that shifts and scales the channels"
        )
    return MeasuredPreprocess(mean.tolist(), std.tolist(), rows if resizes else None, rule)


def _find_rule(
    preprocess: Callable[[Image.Image], Tensor],
    scale: Callable[[Image.Image], Tensor],
    side: int | None,
) -> ResizeRule | None:
    """Return the rule whose squares of a photo, scaled, are what a preprocessing returns; None if there is none.

    Args:
        preprocess: Returns f[3, S, S], or f[3, H, W] if it does not resize.
        scale: Its normalisation, of photos that are resized.
        side: S; None if it does not resize.
    """
    noise = np.random.default_rng(0).integers(0, 256, (PHOTO[1], PHOTO[0], 3), np.uint8)
    photo = Image.fromarray(noise)
    seen = _run(preprocess, photo)
    if side is None:
        return ResizeRule() if torch.allclose(seen, scale(photo), atol=TOLERANCE) else None
    crops = [Fraction(before, side) for before in range(side, round(MOST_CROPPED * side) + 1)]
    for way, before in (("squash", Fraction(1)), *(("center_crop", crop) for crop in crops)):
        for resample in FILTERS:
            rule = ResizeRule(way, resample, before)
            square = Geometry((1, 1), side, side, rule, (0, 0, 0)).place(photo)
            if torch.allclose(seen, scale(square), atol=TOLERANCE):
                return rule
    return None


def _check_pair(pair: tuple[Sequence[float], Sequence[float]]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation as lists; raise a UserError unless they are three numbers each."""
    try:
        mean, std = ([float(x) for x in values] for values in pair)
    except (TypeError, ValueError):
        raise UserError(f"preprocess is {pair!r}; {EXPECTED}") from None
    if len(mean) != 3 or len(std) != 3 or not all(0 < x <= 1 for x in std):
        raise UserError(f"preprocess is {pair!r}; {EXPECTED}")
    if not all(0 <= x <= 1 for x in mean):
        raise UserError(
            f"preprocess is {pair!r}, whose mean is none of pixels of 0 to 1; if it is of 0 to 255, divide both by 255"
        )
    return mean, std


def _plain(colour: int | tuple[int, ...]) -> Image.Image:
    """Return a photo of one colour."""
    colour = (colour,) * 3 if isinstance(colour, int) else colour
    return Image.new("RGB", PHOTO, colour)


def _run(preprocess: Callable[[Image.Image], Tensor], photo: Image.Image) -> Tensor:
    """Return what a preprocessing makes of a photo, f32[3, H, W]."""
    pixels = preprocess(photo)
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or len(pixels) != 3:
        got = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"preprocess returned {got}; {EXPECTED}")
    return pixels.detach().float().cpu()
