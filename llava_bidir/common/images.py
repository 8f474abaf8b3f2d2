"""Open untrusted image files, and say how the pixels of each kind of image are read.

There are two rules, by where an image comes from:

- A person's photo (:func:`read_photo`) is turned as its EXIF tag says and viewers show it. These are the photos that
  commands such as `llava-bidir generate` take, and those given to Python functions.
- An image of a data set (:func:`read_image`) is read as stored, because its masks match the stored pixels, and because
  LLaVA trains on stored pixels. These are training records, benchmarks, and images with masks or boxes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

# Formats of image datasets. PIL knows more, and some of them run other programs: EPS runs Ghostscript.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 2 to 4 keep the size, 5 to 8 swap width and height

PhotoLike = str | Path | Image.Image


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is no readable tag."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # viewers cannot read it either
        return 1


def as_stored(image: Image.Image) -> Image.Image:
    """Return an image of a data set as RGB without transparency, with the pixels as stored.

    A TIFF is the exception: Pillow turns it as its orientation tag says while it decodes it. The result has no EXIF
    tag, so that :func:`upright` does not turn it later.

    Raises:
        UserError: It has more than 8 bits per channel; PIL would clip such values at 255.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"mode {image.mode!r}, more than 8 bits per channel, does not define white; save the image with 8 bits"
        )
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def upright(image: Image.Image) -> Image.Image:
    """Return a person's photo as RGB, turned as its EXIF tag says; the result has no tag.

    Raises:
        UserError: As :func:`as_stored`.
    """
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    return as_stored(image)


def read_image(
    file: str | Path | BinaryIO,
    convert: Callable[[Image.Image], Any] = as_stored,
    formats: tuple[str, ...] = IMAGE_FORMATS,
) -> Any:
    """Return an image as RGB, with the pixels as stored, or what `convert` makes of it.

    Raises:
        UserError: Names the file, which is missing, too large, deeper than 8 bits, or cannot be decoded.
    """
    try:
        with Image.open(file, formats=formats) as image:
            return convert(image)
    except UnidentifiedImageError:
        raise UserError(
            f"{file} cannot be read as an image: it is not {' or '.join(formats)}"
        ) from None
    # decoders fail in many ways on malformed files: IndexError, struct.error, ...
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}") from None


def read_photo(photo: PhotoLike | BinaryIO) -> Image.Image:
    """Return a person's photo, a file or a PIL image, as upright RGB.

    Raises:
        UserError: It cannot be read (:func:`read_image`).
    """
    if isinstance(photo, Image.Image):
        return upright(photo)
    return read_image(photo, upright)


def read_photos(photos: PhotoLike | Sequence[PhotoLike]) -> list[Image.Image]:
    """Return one photo or several as :func:`read_photo` does."""
    if not isinstance(photos, list | tuple):
        photos = [photos]
    return [read_photo(photo) for photo in photos]


MAX_GRID_SIDE = 128  # patches per side; the largest encoders have 64


def check_image_px(image_px: int, patch_px: int, option: str) -> None:
    """Raise a UserError that names `option` unless a side in pixels is a usable multiple of the patch."""
    if image_px % patch_px or not 1 <= image_px // patch_px <= MAX_GRID_SIDE:
        raise UserError(
            f"{option} {image_px}: expected a multiple of the patch, {patch_px} px, up to {MAX_GRID_SIDE * patch_px}"
        )
