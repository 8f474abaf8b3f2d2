"""The normalisation of a user's preprocessing, measured: photos of one colour tell it, however photos are resized.

Masks are placed by the rule that makes photos squares (`probes/ops/geometry.py`), so that the rule has to be known: it
is the one that makes the same square of a photo of noise. If there is none, a photo whose colours are its coordinates
tells which part of it the square shows.
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
SQUARE = (64, 64)  # of a photo that needs no padding
FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS)
MOST_CROPPED = 1.34  # side before a crop in units of the side after; timm's is 1.14, or less
TOLERANCE = 1e-3  # of normalised values, which are of the size of 1
# Of pixels: the mean colour, with which a preprocessing may pad, is between two levels.
LEVEL = 1 / 255
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
        shown: Which part of a photo the square shows, in words, if the rule is none of the known ones.
    """

    mean: list[float]
    std: list[float]
    side_px: int | None
    rule: ResizeRule | None
    shown: str = ""


def measure_preprocess(
    preprocess: Callable[[Image.Image], Tensor] | tuple[Sequence[float], Sequence[float]],
) -> MeasuredPreprocess:
    """Return the normalisation of a pair or a function.

    Raises:
        UserError: It is neither, or does more to colours than to shift and scale each channel.
    """
    if not callable(preprocess):
        return MeasuredPreprocess(*_check_pair(preprocess), None, ResizeRule())
    black, white = (_run(preprocess, _plain(value, SQUARE)) for value in (0, 255))
    low, high = (pixels.flatten(1).mean(1) for pixels in (black, white))
    if not (high > low).all():
        raise UserError(
            f"preprocess makes white {high.tolist()} and black {low.tolist()}; expected more for white"
        )
    rows, columns = _run(preprocess, _plain(0, PHOTO)).shape[1:]
    resizes = (columns, rows) != PHOTO
    if resizes and rows != columns:
        raise UserError(
            f"preprocess makes {columns} x {rows} px of a photo of {PHOTO[0]} x {PHOTO[1]}; expected a square, or as "
            "many pixels as before"
        )
    if resizes and black.shape[1:] != (rows, columns):
        raise UserError(
            f"preprocess makes a square of {rows} px of a photo of {PHOTO[0]} x {PHOTO[1]}, and of {black.shape[1]} px "
            f"of one of {SQUARE[0]} x {SQUARE[1]}; expected squares of one side"
        )
    colour = (200, 90, 30)
    seen = _run(preprocess, _plain(colour, SQUARE))
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
        return (_pixels(photo) - mean[:, None, None]) / std[:, None, None]

    if not resizes:
        if not torch.allclose(_run(preprocess, _noise()), scale(_noise()), atol=TOLERANCE):
            raise UserError(
                "preprocess changes pixels by their neighbours; expected a function that shifts and scales the channels"
            )
        return MeasuredPreprocess(mean.tolist(), std.tolist(), None, ResizeRule())

    def colours(photo: Image.Image) -> Tensor:
        return _run(preprocess, photo) * std[:, None, None] + mean[:, None, None]

    rule = _find_rule(colours, rows, (std * TOLERANCE).max().item())
    shown = "" if rule else _describe_part(colours)
    return MeasuredPreprocess(mean.tolist(), std.tolist(), rows, rule, shown)


def _find_rule(
    colours: Callable[[Image.Image], Tensor], side: int, tolerance: float
) -> ResizeRule | None:
    """Return the rule whose square of a photo is the one that a preprocessing makes; None if there is none.

    Args:
        colours: Returns the square before it is normalised, f[3, S, S] of 0 to 1.
        side: S.
        tolerance: Of colours; a padding may differ by a level of 8 bits, too.
    """
    seen = colours(_noise())
    padding = tuple(round(255 * x) for x in colours(_plain(0, PHOTO))[:, 0, 0].tolist())
    is_colour = all(0 <= x <= 255 for x in padding)
    crops = [Fraction(before, side) for before in range(side, round(MOST_CROPPED * side) + 1)]
    rules = [{"way": "squash"}]
    rules += [{"way": "center_crop", "before_crop": crop} for crop in crops]
    rules += [{"way": way, "padding": padding} for way in ("pad", "letterbox") if is_colour]
    for options in rules:
        allowed = tolerance + LEVEL * ("padding" in options)
        for resample in FILTERS:
            rule = ResizeRule(resample=resample, **options)
            square = Geometry((1, 1), side, side, rule, padding).place(_noise())
            if torch.allclose(seen, _pixels(square), rtol=0, atol=allowed):
                return rule
    return None


def _describe_part(colours: Callable[[Image.Image], Tensor]) -> str:
    """Return which part of a photo its square shows, in words: by a photo whose red is its column, and green its row.

    Args:
        colours: As of :func:`_find_rule`. The middle of the square tells, so that a padding is beyond the photo.
    """
    width, height = PHOTO
    rows, columns = np.mgrid[:height, :width]
    channels = [columns / (width - 1), rows / (height - 1), 0 * rows]
    ramp = (255 * np.stack(channels, -1)).round().astype(np.uint8)
    seen = colours(Image.fromarray(ramp))
    centre = seen.shape[1] // 2
    spans = []
    for profile, length in ((seen[0, centre], width), (seen[1, :, centre], height)):
        middle = slice(len(profile) // 4, -(len(profile) // 4))
        places = np.arange(len(profile))[middle] + 0.5
        slope, start = np.polyfit(places, profile[middle].numpy() * (length - 1) + 0.5, 1)
        spans.append(f"{start:.0f} to {start + slope * len(profile):.0f} of its {length}")
    return f"about columns {spans[0]}, and rows {spans[1]}"


def _noise() -> Image.Image:
    """Return a photo of noise that is no square."""
    drawn = np.random.default_rng(0).integers(0, 256, (PHOTO[1], PHOTO[0], 3), np.uint8)
    return Image.fromarray(drawn)


def _pixels(photo: Image.Image) -> Tensor:
    """Return the colours of a photo, f32[3, H, W] of 0 to 1."""
    return torch.from_numpy(np.asarray(photo) / np.float32(255)).movedim(-1, 0)


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


def _plain(colour: int | tuple[int, ...], size: tuple[int, int]) -> Image.Image:
    """Return a photo of one colour; `size` is its width and height."""
    colour = (colour,) * 3 if isinstance(colour, int) else colour
    return Image.new("RGB", size, colour)


def _run(preprocess: Callable[[Image.Image], Tensor], photo: Image.Image) -> Tensor:
    """Return what a preprocessing makes of a photo, f32[3, H, W]."""
    pixels = preprocess(photo)
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == 1:
        pixels = pixels[0]
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or len(pixels) != 3:
        got = list(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise UserError(f"preprocess returned {got}; {EXPECTED}")
    return pixels.detach().float().cpu()
