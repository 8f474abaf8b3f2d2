"""An image and its mask: how they are read, and what must hold for them, whatever layout they come in.

Pixels are read as they are stored. An EXIF tag that asks viewers to turn a photo is not followed, since the official
masks lie on the stored pixels; where a mask's size says, or could say, that it was drawn on the turned picture, the
pair is refused. Of an animation the first picture is taken. Symlinks are followed: the files are those that lie in the
dataset's folder, by no names that come from elsewhere.
"""

import io
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from llava_bidir.common.errors import UserError
from llava_bidir.common.image_io import FORMATS, open_bounded
from probes.ops.geometry import to_rgb

IGNORE_INDEX = 255
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 2 to 4 keep the size, 5 to 8 swap width and height


class BadFile(UserError):
    """A file that cannot be used; `kind` groups those of a dataset by what is wrong."""

    def __init__(self, message: str, kind: str = "unusable"):
        super().__init__(message)
        self.kind = kind


class Embedded(io.BytesIO):
    """A file that lies inside another one; its `name` stands for it in messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


File = Path | Embedded


class SegmentationDataset(Dataset):
    """Images with their masks: {"name": str, "image": PIL RGB, "target": uint8[H, W], 255 where ignored}.

    A layout is a subclass that finds the files and says what the labels mean.

    Args:
        files: {name: (image, mask)}, in the order of the dataset.
        classes: Names of the K classes.
        lookup: int16[256] from :func:`lookup`.
        palette: A colour a class; None if the dataset has none.
        groups: A label for each image where images come in clusters (the city), or None.

    Raises:
        UserError: Lookup, palette or groups do not fit the classes and files.
        BadFile: On reading, an image or mask is not what it must be.
    """

    official_size: int | None = None  # images of this split as published

    def __init__(
        self,
        files: dict[str, tuple[Path, Path]],
        classes: list[str],
        lookup: ndarray,
        palette: list[list[int]] | None = None,
        groups: list[str] | None = None,
    ):
        self.names, self._files = list(files), list(files.values())
        self.classes, self.palette, self.groups = classes, palette, groups
        self._lookup = lookup
        self._check()

    def _check(self) -> None:
        """What a layout says must fit together, or scores would be of other classes without a word."""
        layout, count = type(self).__name__, len(self.classes)
        highest = self._lookup[self._lookup != IGNORE_INDEX].max()
        if self._lookup.shape != (256,) or highest >= count:
            raise UserError(f"{layout}: the lookup leads to class {highest}, but {count} are named, from 0 on")
        if self.palette is not None and len(self.palette) != count:
            raise UserError(f"{layout}: {len(self.palette)} colours in the palette for {count} classes")
        if self.groups is not None and len(self.groups) != len(self.names):
            raise UserError(f"{layout}: {len(self.groups)} groups for {len(self.names)} images")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        image_file, mask_file = self.files(index)
        image, mask = open_image(image_file), open_image(mask_file, ("PNG",))
        check_sizes(image, mask, image_file, mask_file)
        target = read_labels(mask, mask_file, self._lookup, self.classes)
        return {"name": self.names[index], "image": read_rgb(image, image_file), "target": target}

    def files(self, index: int) -> tuple[File, File]:
        """Image and mask."""
        return self._files[index]


def lookup(classes: int, first: int = 0, ignored: tuple[int, ...] = (IGNORE_INDEX,)) -> ndarray:
    """int16[256]: raw label -> class; 255 for what is ignored, -1 for what must not occur.

    Args:
        classes: K; their raw labels follow one another.
        first: The raw label of class 0.
        ignored: Raw labels that stand for no class.
    """
    table = np.full(256, -1, np.int16)
    table[first : first + classes] = np.arange(classes)
    table[list(ignored)] = IGNORE_INDEX
    return table


def open_image(file: File, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The decoded picture.

    Raises:
        BadFile: It is not there, cannot be read, or would take more memory than a picture should.
    """
    try:
        image = open_bounded(file, formats)
        image.load()
    except FileNotFoundError:
        raise BadFile(f"{file} is not there", "missing") from None
    except UnidentifiedImageError:
        raise BadFile(f"{file} cannot be read as an image: it is no {' or '.join(formats)}", "cannot be read") from None
    except Exception as error:  # files made to break decoders break them in many ways: IndexError, struct.error, ...
        message = f"{file} cannot be read as an image: {str(error) or type(error).__name__}"
        raise BadFile(message, "cannot be read") from None
    return image


def read_rgb(image: Image.Image, file: File) -> Image.Image:
    """The picture with 8 bits a channel."""
    try:
        return to_rgb(image)
    except ValueError as error:
        raise BadFile(f"{file}: {error}", "cannot be read") from None


def check_sizes(image: Image.Image, mask: Image.Image, image_file: File, mask_file: File) -> None:
    """Image and mask have the same pixels, beyond doubt."""
    orientation = _orientation(image)
    turned = image.size[::-1] if orientation in range(5, 9) else image.size
    if orientation in range(2, 9) and mask.size == turned:
        sure = "is the size of" if turned != image.size else "could be drawn on"
        raise BadFile(
            f"{image_file} asks viewers to turn it (EXIF orientation {orientation}), and its mask {mask_file} {sure} "
            "the turned picture, while pixels are read as stored; store it turned (`mogrify -auto-orient`) if the mask "
            "fits that, otherwise remove the tag (`exiftool -Orientation=`)",
            "EXIF orientation",
        )
    if mask.size != image.size:
        raise BadFile(
            f"{mask_file} is {mask.size[0]} x {mask.size[1]} px, its image {image_file} {image.size[0]} x "
            f"{image.size[1]} px; they must be the same",
            "image and mask of different size",
        )


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where there is no tag, or none that can be read."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # no viewer can follow it either
        return 1


def read_labels(mask: Image.Image, file: File, lookup: ndarray, classes: list[str]) -> ndarray:
    """uint8[H, W]: the class of each pixel, 255 where ignored."""
    if mask.mode not in ("L", "P"):
        advice = {
            "RGB": "these are colours; convert them to class indices first",
            "RGBA": "these are colours; convert them to class indices first",
            "I;16": "this is a 16-bit file; save the indices with 8 bits",
            "I": "this is a file of more than 8 bits; save the indices with 8",
        }.get(mask.mode, "save it as 8-bit PNG")
        raise BadFile(
            f"{file} has mode {mask.mode!r}, but a mask has one 8-bit class index a pixel (mode L or P): {advice}",
            "mask that is not 8-bit indices",
        )
    raw = np.asarray(mask)
    target = lookup[raw]
    if (target < 0).any():
        wrong = np.unique(raw[target < 0]).tolist()
        known = np.flatnonzero(lookup >= 0)
        raise BadFile(
            f"{file} has label {', '.join(map(str, wrong[:5]))}, but there are {len(classes)} classes and the labels "
            f"{_ranges(known)}",
            "label out of range",
        )
    return target.astype(np.uint8)


def _ranges(numbers: ndarray) -> str:
    """[0, 1, 2, 255] -> "0 to 2, 255"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
