"""Open untrusted image files within bounds."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import UserError

# Formats of image datasets. PIL knows more, and some of them run other programs: EPS runs Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def open_bounded(file: Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image and read its header only.

    Raises:
        OSError: The file is missing, not a regular file, or (UnidentifiedImageError) in none of the formats.
        UserError: The image, padded to a square, exceeds the pixel limit of PIL, which raises DecompressionBombError at
            twice the limit.
    """
    if isinstance(file, Path) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("it is not a regular file")  # reading a pipe or a device may never end
    image = Image.open(file, formats=formats)
    limit, longest = Image.MAX_IMAGE_PIXELS, max(image.size)
    if limit and longest**2 > limit:  # padding makes a square of an image with a single row
        image.close()
        raise UserError(
            f"it has {image.width:,} x {image.height:,} px; a square of that side exceeds the {limit:,} px of "
            "PIL.Image.MAX_IMAGE_PIXELS. It may be a decompression bomb; resize or remove it"
        )
    return image
