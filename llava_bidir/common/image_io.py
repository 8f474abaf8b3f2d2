"""Open untrusted image files within bounds, and say how the pixels of each kind of image are read.

There are two rules, by where an image comes from:

- A person's photo (:func:`read_photo`, :func:`upright`) is turned as its EXIF tag says and viewers show it. These are
  the photos that commands such as `llava-bidir generate` take, and those given to Python functions.
- An image of a data set (:func:`as_stored`) is read as stored, because its masks match the stored pixels, and because
  LLaVA trains on stored pixels. These are training records, benchmarks, and images with masks or boxes.
"""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import UserError

# Formats of image datasets. PIL knows more, and some of them run other programs: EPS runs Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
ORIENTATION = 0x0112  # EXIF tag; 1 is upright, 2 to 4 keep the size, 5 to 8 swap width and height
LONGEST_STRIP = 16  # length of a strip that is resized, in units of its shorter side

PhotoLike = str | Path | Image.Image


def open_bounded(file: Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image and read its header only.

    Raises:
        OSError: The file is missing, not a regular file, or (UnidentifiedImageError) in none of the formats.
        UserError: The image exceeds the pixel limit of PIL, which raises DecompressionBombError at twice the limit.
    """
    if isinstance(file, Path) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("it is not a regular file")  # reading a pipe or a device may never end
    image = Image.open(file, formats=formats)
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        image.close()
        raise UserError(
            f"it has {image.width:,} x {image.height:,} px, more than the {limit:,} of PIL.Image.MAX_IMAGE_PIXELS. It "
            "may be a decompression bomb; resize or remove it"
        )
    return image


def check_padded(image: Image.Image) -> None:
    """Raise if the square that padding makes of an image, perhaps of a single row, exceeds the pixel limit of PIL.

    Raises:
        UserError: Names the size of the image and the limit.
    """
    limit = Image.MAX_IMAGE_PIXELS
    side = max(image.size)
    if limit and side**2 > limit:
        raise UserError(
            f"an image of {image.width:,} x {image.height:,} px is padded to a square of {side:,} px, which exceeds "
            f"the {limit:,} px of PIL.Image.MAX_IMAGE_PIXELS; resize it, or cut out a part"
        )


def png_bits(file: Path | BinaryIO) -> int:
    """Return the bits per pixel and channel of a PNG file, which are in its header; PIL scales grey ones below 8."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return stream.read(25)[24]
    position = file.tell()
    file.seek(0)
    header = file.read(25)
    file.seek(position)
    return header[24]


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is no readable tag."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # viewers cannot read it either
        return 1


def check_depth(image: Image.Image) -> None:
    """Raise if an image has more than 8 bits per channel; PIL would clip such values at 255.

    Raises:
        UserError: The mode does not define white.
    """
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"mode {image.mode!r}, more than 8 bits per channel, does not define white; save the image with 8 bits"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the image as RGB without transparency; raise a UserError as :func:`check_depth`."""
    check_depth(image)
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Return a person's photo as RGB, turned as its EXIF tag says; the result has no tag.

    Raises:
        UserError: As :func:`check_depth`.
    """
    if orientation(image) in range(2, 9):
        image = ImageOps.exif_transpose(image)
    return as_stored(image)


def as_stored(image: Image.Image) -> Image.Image:
    """Return an image of a data set as RGB, with the pixels as stored.

    A TIFF is the exception: Pillow turns it as its orientation tag says while it decodes it. The result has no EXIF
    tag, so that :func:`upright` does not turn it later.

    Raises:
        UserError: As :func:`check_depth`.
    """
    rgb = to_rgb(image)
    rgb.info = {}
    return rgb


def read_photo(file: str | Path | BinaryIO) -> Image.Image:
    """Return a person's photo as upright RGB.

    Raises:
        UserError: Names the file, which is missing, too large, or cannot be decoded.
    """
    file = Path(file) if isinstance(file, str) else file
    try:
        with open_bounded(file) as image:
            return upright(image)
    except FileNotFoundError:
        raise UserError(f"{file} is missing; expected a photo") from None
    except UnidentifiedImageError:
        formats = ", ".join(FORMATS)
        raise UserError(f"{file} cannot be read as an image: it is not one of {formats}") from None
    # decoders fail in many ways on malformed files: IndexError, struct.error, ...
    except Exception as error:
        raise UserError(
            f"{file} cannot be read as an image: {str(error) or type(error).__name__}"
        ) from None


def is_photo(word: str) -> bool:
    """Return whether a word of a command line is an existing picture, or is named like one."""
    if Path(word).suffix.lower() in SUFFIXES:
        return True
    try:
        open_bounded(Path(word)).close()
    except Exception:  # no file, or a file of another kind
        return False
    return True


def as_photo(photo: PhotoLike) -> Image.Image:
    """Return one photo, a path or a PIL image, as upright RGB.

    Raises:
        UserError: It is of another type, or cannot be read.
    """
    if isinstance(photo, Image.Image):
        return upright(photo)
    if isinstance(photo, str | Path):
        return read_photo(photo)
    kind = type(photo).__name__
    raise UserError(
        f"expected the path of a photo or a PIL image, got {kind}; `Image.fromarray` makes one of an array"
    )


def read_photos(photos: PhotoLike | Sequence[PhotoLike]) -> list[Image.Image]:
    """Return photos as upright RGB.

    Args:
        photos: Path or PIL image of a photo, or a list of these.

    Raises:
        UserError: There is none, one is of another type, or it cannot be read.
    """
    if isinstance(photos, str | Path | Image.Image):
        photos = [photos]
    if not isinstance(photos, Sequence):
        raise UserError(
            f"expected the path of a photo, a PIL image or a list of these, got {type(photos).__name__}"
        )
    if not photos:
        raise UserError("got an empty list of photos; expected at least one")
    return [as_photo(photo) for photo in photos]


def trim_strip(image: Image.Image) -> Image.Image:
    """Return the middle of an image that is more than `LONGEST_STRIP` times as long as wide; others as they are.

    "center_crop" resizes the whole image before it cuts the middle out: the pixels that it makes grow with the length,
    3 GB for 3,000 x 1 px. What is cut off here is a multiple of the shorter side, so that the middle stays on the same
    pixels. If the shorter side divides the resized length, the result is equal, else shifted by less than 1/32 px.
    """
    shorter = min(image.size)
    excess = max(image.size) - LONGEST_STRIP * shorter
    cut = max(excess, 0) // (2 * shorter) * shorter
    if not cut:
        return image
    if image.width > image.height:
        return image.crop((cut, 0, image.width - cut, image.height))
    return image.crop((0, cut, image.width, image.height - cut))
