"""Base classes of datasets: how images and masks are read and checked, independent of the file layout.

Pixels are read as stored. The EXIF orientation is ignored, because official masks match the stored pixels. A pair is
rejected if the size of its mask suggests that the mask was drawn on the rotated image. Only the first frame of an
animation is read. Symlinks are followed.
"""

import io
import os
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums, describe_digest
from llava_bidir.common.images import FORMATS, as_stored, open_bounded, orientation, png_bits
from probes.ops.geometry import IGNORE_INDEX


class BadFile(UserError):
    """A file that cannot be used; `kind` is the defect, by which reports group files."""

    def __init__(self, message: str, kind: str = "unusable"):
        super().__init__(message)
        self.kind = kind


class EmbeddedFile(io.BytesIO):
    """The bytes of a file stored inside another one, with a name for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


File = Path | EmbeddedFile


class ImageDataset(Dataset):
    """Images with a target for each pixel: {"name": str, "image": PIL RGB, "target": array[H, W] or [H, W, channels]}.

    A task is a subclass that reads a target, a layout a subclass of that one that lists the files.

    Args:
        files: {name: (image, target, ...)}, in the order of the dataset.
        classes: Names of the K classes; none if targets are real numbers.
        palette: One colour per class, or None.
        groups: The cluster of each image (e.g. its city), or None.

    Raises:
        UserError: If palette or groups do not match the classes and files.
        BadFile: On access, if an image or target is invalid.
    """

    task: str  # of the key data.task
    parts: tuple[str, ...]  # names of the files of an image, in the identity of a run
    target_name: str  # name of a target file in messages
    official_size: int | None = None  # published number of images in this split

    def __init__(
        self,
        files: dict[str, tuple[Path, ...]],
        classes: list[str],
        palette: list[list[int]] | None = None,
        groups: list[str] | None = None,
    ):
        self.names = list(files)
        self._files = list(files.values())
        self.classes = classes
        self.palette = palette
        self.groups = groups
        layout = type(self).__name__
        if palette is not None and len(palette) != len(classes):
            raise UserError(
                f"{layout}: {len(palette)} colours in the palette for {len(classes)} classes"
            )
        if groups is not None and len(groups) != len(self.names):
            raise UserError(f"{layout}: {len(groups)} groups for {len(self.names)} images")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        image_file, *target_files = self.files(index)
        image = open_image(image_file)
        target = self.read_target(image, image_file, *target_files)
        return {
            "name": self.names[index],
            "image": read_rgb(image, image_file),
            "target": target.astype(np.uint8) if target.dtype == bool else target,
        }

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        *target_files: File,
    ) -> ndarray:
        """Return the target of an image, or raise a BadFile that names the file."""
        raise NotImplementedError

    def files(self, index: int) -> tuple[File, ...]:
        """Return the files of an image and its target."""
        return self._files[index]

    def identity(self) -> dict[str, str]:
        """Return what the split is: number and digest of its images and of their targets, by name and content."""
        return {
            part: describe_digest([self.names, self.digests(part)], len(self))
            for part in self.parts
        }

    def digests(self, part: str) -> list[str]:
        """Return the checksum of each image's file of a part, such as "images"; "" of one that cannot be read."""
        files = [group[self.parts.index(part)] for group in self._files]
        folder = os.path.commonpath([file.parent for file in files])
        return list(checksums(folder, [os.path.relpath(file, folder) for file in files]).values())


class SegmentationDataset(ImageDataset):
    """Images with masks: targets are uint8[H, W], classes or 255 where ignored.

    A layout is a subclass that lists the files and defines the meaning of the labels.

    Args:
        files: {name: (image, mask)}, in the order of the dataset.
        classes: Names of the K classes.
        lookup: int16[256] from :func:`lookup`.
        palette: One colour per class, or None.
        groups: The cluster of each image (e.g. its city), or None.

    Raises:
        UserError: If lookup, palette or groups do not match the classes and files; a mismatch would silently score the
            wrong classes.
        BadFile: On access, if an image or mask is invalid.
    """

    task = "segmentation"
    parts = ("images", "masks")
    target_name = "mask"

    def __init__(
        self,
        files: dict[str, tuple[Path, Path]],
        classes: list[str],
        lookup: ndarray,
        palette: list[list[int]] | None = None,
        groups: list[str] | None = None,
    ):
        highest = lookup[lookup != IGNORE_INDEX].max()
        if lookup.shape != (256,) or highest >= len(classes):
            layout = type(self).__name__
            raise UserError(
                f"{layout}: the lookup contains class {highest}, but there are {len(classes)} classes, from 0"
            )
        if impossible := [name for i, name in enumerate(classes) if i not in lookup]:
            raise UserError(
                f"{type(self).__name__}: no label means the class {impossible[0]!r}; leave it out of the classes"
            )
        super().__init__(files, classes, palette, groups)
        self._lookup = lookup

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        mask_file: File,
    ) -> ndarray:
        """Return the class of each pixel, uint8[H, W], 255 where ignored, or raise a BadFile that names the file."""
        mask = open_image(mask_file, ("PNG",))
        check_sizes(image, mask.size, image_file, mask_file, self.target_name)
        return read_labels(mask, mask_file, self._lookup, self.classes)


def lookup(classes: int, first: int = 0, ignored: tuple[int, ...] = (IGNORE_INDEX,)) -> ndarray:
    """Return the table int16[256] from raw label to class: 255 if ignored, -1 if invalid.

    Args:
        classes: K; their raw labels are consecutive.
        first: Raw label of class 0.
        ignored: Raw labels of ignored pixels.
    """
    table = np.full(256, -1, np.int16)
    table[first : first + classes] = np.arange(classes)
    table[list(ignored)] = IGNORE_INDEX
    return table


def shared_images(a: ImageDataset, b: ImageDataset) -> list[tuple[str, str]]:
    """Return the names in both splits of the images that are the same byte for byte."""
    names = {
        digest: name for name, digest in zip(a.names, a.digests("images"), strict=True) if digest
    }
    found = zip(b.names, b.digests("images"), strict=True)
    return [(names[digest], name) for name, digest in found if digest in names]


def open_image(file: File, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Return the decoded image.

    Raises:
        BadFile: If the file is missing, cannot be decoded, or exceeds the size limit.
    """
    try:
        image = open_bounded(file, formats)
        image.load()
    except FileNotFoundError:
        raise BadFile(f"{file} is missing", "missing") from None
    except UnidentifiedImageError:
        raise BadFile(
            f"{file} cannot be read as an image: it is not {' or '.join(formats)}", "cannot be read"
        ) from None
    except Exception as error:  # corrupt files raise many types: IndexError, struct.error, ...
        message = f"{file} cannot be read as an image: {str(error) or type(error).__name__}"
        raise BadFile(message, "cannot be read") from None
    return image


def read_rgb(image: Image.Image, file: File) -> Image.Image:
    """Return the image as stored, RGB with 8 bits per channel, or raise a BadFile that names `file`."""
    try:
        return as_stored(image)
    except ValueError as error:
        raise BadFile(f"{file}: {error}", "cannot be read") from None


def check_sizes(
    image: Image.Image,
    size: tuple[int, int],
    image_file: File,
    target_file: File,
    target_name: str = "mask",
) -> None:
    """Raise a BadFile unless image and target have the same size and an EXIF tag leaves no doubt about the rotation.

    Args:
        image: The decoded image.
        size: Width and height of its target.
        image_file: File of the image.
        target_file: File of the target.
        target_name: Name of the target in the message.
    """
    tag = orientation(image)
    rotated = image.size[::-1] if tag in range(5, 9) else image.size
    if tag in range(2, 9) and size == rotated:
        evidence = "has the size of" if rotated != image.size else "may have been drawn on"
        raise BadFile(
            f"{image_file} has EXIF orientation {tag}, and its {target_name} {target_file} {evidence} the "
            "rotated image, but pixels are read as stored; rotate the image (`mogrify -auto-orient`) if the "
            f"{target_name} matches the rotated image, else remove the tag (`exiftool -Orientation=`)",
            "EXIF orientation",
        )
    if size != image.size:
        raise BadFile(
            f"{target_file} is {size[0]} x {size[1]} px, its image {image_file} {image.size[0]} x {image.size[1]} px; "
            "expected the same size",
            f"image and {target_name} of different size",
        )


def read_labels(
    mask: Image.Image,
    file: File,
    lookup: ndarray,
    classes: list[str],
) -> ndarray:
    """Return the class of each pixel, uint8[H, W], 255 where ignored, or raise a BadFile that names `file`."""
    if mask.mode not in ("L", "P"):
        advice = {
            "RGB": "these are colours; convert them to class indices",
            "RGBA": "these are colours; convert them to class indices",
            "I;16": "this is a 16-bit file; save the indices with 8 bits",
            "I": "this file has more than 8 bits; save the indices with 8 bits",
        }.get(mask.mode, "save it as 8-bit PNG")
        raise BadFile(
            f"{file} has mode {mask.mode!r}, expected one 8-bit class index per pixel (mode L or P): {advice}",
            "mask that is not 8-bit indices",
        )
    if mask.mode == "L" and (bits := png_bits(file)) < 8:
        raise BadFile(
            f"{file} has {bits} bits per pixel, whose labels PIL reads as multiples of {255 // (2**bits - 1)}; "
            "save it as 8-bit PNG",
            "mask that is not 8-bit indices",
        )
    raw = np.asarray(mask)
    target = lookup[raw]
    if (target < 0).any():
        wrong = np.unique(raw[target < 0]).tolist()
        valid = np.flatnonzero(lookup >= 0)
        raise BadFile(
            f"{file} has label {', '.join(map(str, wrong[:5]))}, but there are {len(classes)} classes and the labels "
            f"{_format_ranges(valid)}",
            "label out of range",
        )
    return target.astype(np.uint8)


def _format_ranges(numbers: ndarray) -> str:
    """Return [0, 1, 2, 255] as "0 to 2, 255"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
