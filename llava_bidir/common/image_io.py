"""Opens image files that others made, within bounds."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from .errors import UserError

# What data sets come in. PIL knows more, and some of those run other programs: EPS is Ghostscript's.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def open_bounded(file: Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The picture, of which only the header is read so far.

    Raises:
        OSError: It is not there, no regular file, or (UnidentifiedImageError) of none of these formats.
        UserError: It would take more memory than a picture should.
    """
    if isinstance(file, Path) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError("it is no regular file")  # a pipe would be waited for, a device may never end
    image = Image.open(file, formats=formats)
    most, longest = Image.MAX_IMAGE_PIXELS, max(image.size)
    if most and longest**2 > most:  # padded to a square, a picture of one row is as large as one of many
        image.close()
        raise UserError(
            f"it is {image.width:,} x {image.height:,} px, and a square of that takes more than the {most:,} of "
            "PIL.Image.MAX_IMAGE_PIXELS: a decompression bomb, or to be made smaller"
        )
    return image
