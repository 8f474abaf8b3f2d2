"""Base classes of datasets: how images and masks are read and checked, independent of the file layout.

Pixels are read as stored. The EXIF orientation is ignored, because official masks match the stored pixels. A pair is
rejected if the size of its mask suggests that the mask was drawn on the rotated image. Only the first frame of an
animation is read. Symlinks are followed.
"""

import io
import os
from collections.abc import Sequence
from colorsys import hsv_to_rgb
from pathlib import Path
from textwrap import shorten

import numpy as np
from numpy import ndarray
from PIL import Image
from torch.utils.data import Dataset

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import checksums, describe_digest
from llava_bidir.common.images import as_stored, orientation, read_image
from llava_bidir.common.imports import name_of
from probes.ops.geometry import IGNORE_INDEX, ignore_index_of

TURNED = range(5, 9)  # EXIF orientations that swap width and height
GREY = 0  # colour type in the header of a PNG
GOLDEN = 0.381966  # step between hues, after which they stay distinct for any number of classes


class EmbeddedFile(io.BytesIO):
    """The bytes of a file stored inside another one, with a name for messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name

    def __str__(self) -> str:
        return self.name


class ImageDataset(Dataset):
    """Images with a target for each pixel: {"name": str, "image": PIL RGB, "target": array[H, W] or [H, W, channels]}.

    A task is a subclass that reads a target, a layout a subclass of that one that lists the files.

    Args:
        files: {name: (image, target, ...)}, in the order of the dataset.
        classes: Names of the K classes; none if targets are real numbers.
        palette: One colour per class, or None.
        groups: The cluster of each image (e.g. its city), or None. Copies of an image join theirs when all are read.

    Raises:
        UserError: On access, if an image or target is invalid.
    """

    task: str  # of the key data.task
    parts: tuple[str, ...]  # names of the files of an image, in the identity of a run
    target_name: str  # name of a target file in messages
    official_size: int | None = None  # published number of images in this split

    def __init__(
        self,
        files: dict[str, tuple[Path, ...]],
        classes: Sequence[str] = (),
        palette: list[list[int]] | None = None,
        groups: list[str] | None = None,
    ):
        is_listed = isinstance(files, dict) and all(
            isinstance(of_image, tuple) and len(of_image) == len(self.parts)
            for of_image in files.values()
        )
        if not is_listed:
            raise UserError(
                f"{name_of(type(self))} lists its files as {shorten(repr(files), 80)}; expected "
                f"{{name: ({', '.join(self.parts)})}}, a pathlib.Path of each"
            )
        self.names = list(files)
        self.files = list(files.values())
        self.classes = list(classes)
        self.palette = palette
        self.groups = groups

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        image_file, *target_files = self.files[index]
        tag, image = read_image(image_file, lambda image: (orientation(image), as_stored(image)))
        target = self.read_target(*target_files)
        name = f"{self.target_name} {target_files[0]}"
        check_size(image_file, tag, image.size, target.shape[1::-1], target=name)
        if target.dtype == bool:
            target = target.astype(np.uint8)
        return {"name": self.names[index], "image": image, "target": target}

    def read_target(self, *files: Path) -> ndarray:
        """Return the target of an image from its files, or raise a UserError that names the file."""
        raise NotImplementedError

    def identity(self) -> dict[str, str]:
        """Return what the split is: number and digest of its images and of their targets, by name and content."""
        identity = {}
        for part, files in zip(self.parts, zip(*self.files, strict=True), strict=False):
            folder = os.path.commonpath([file.parent for file in files])
            digests = checksums(folder, [os.path.relpath(file, folder) for file in files])
            identity[part] = describe_digest([self.names, [*digests.values()]], len(self))
        return identity


def check_size(
    image: Path | EmbeddedFile,
    tag: int,
    size: tuple[int, int],
    target_size: tuple[int, int],
    target: str,
) -> None:
    """Raise a UserError unless what is annotated has the size of its image, as stored and beyond doubt.

    Args:
        image: The image's file.
        tag: Its EXIF orientation.
        size: Its width and height as stored.
        target_size: Width and height of what is annotated.
        target: What that is, and its file.
    """
    rotated = size
    if tag in TURNED:
        rotated = size[::-1]
    width, height = target_size
    if tag in range(2, 9) and target_size == rotated:
        raise UserError(
            f"{image} has EXIF orientation {tag}, and its {target} has the size of the rotated image, {width} x "
            f"{height} px, but pixels are read as stored, {size[0]} x {size[1]} px; rotate the image (`mogrify "
            "-auto-orient`) if the target matches the rotated image, else remove the tag (`exiftool -Orientation=`)"
        )
    if target_size != size:
        raise UserError(
            f"the {target} is {width} x {height} px, its image {image} "
            f"{size[0]} x {size[1]} px; expected the same size"
        )


class SegmentationDataset(ImageDataset):
    """Images with masks: targets are uint8[H, W], classes or 255 where ignored.

    Targets of more than 255 classes are int16[H, W], -1 where ignored.

    A layout is a subclass that lists the files and defines the meaning of the labels.

    Args:
        files: {name: (image, mask)}, in the order of the dataset.
        classes: Names of the K classes.
        lookup: Integers [256] or [65536] from :func:`lookup`.
        palette: One colour per class, or None.
        groups: The cluster of each image (e.g. its city), or None.

    Raises:
        UserError: If lookup and classes do not match, which would silently score the wrong classes.
        UserError: On access, if an image or mask is invalid.
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
        self._ignored = ignore_index_of(len(classes))
        meant = {label for label in lookup.tolist() if label >= 0} - {self._ignored}
        if meant != set(range(len(classes))):
            raise UserError(
                f"{type(self).__name__}: labels mean the classes {meant}, but there are {len(classes)}, from 0"
            )
        super().__init__(files, classes, palette, groups)
        self._lookup = lookup

    def read_target(self, mask_file: Path) -> ndarray:
        """Return the class of each pixel, uint8[H, W], 255 where ignored, or raise a UserError that names the file."""
        expected = "8- or 16-bit indices of classes, one per pixel and no colours"
        mask = read_png(mask_file, ("L", "P", "I;16", "I"), expected)
        *_, bits, colour = mask_file.read_bytes()[:26]
        if bits < 8 and colour == GREY:  # PIL would multiply the labels
            raise UserError(f"{mask_file} has {bits} bits per pixel; save it as 8-bit PNG")
        # a table of 8-bit labels knows no others
        target = self._lookup.take(mask, mode="clip")
        is_wrong = (target < 0) & (target != self._ignored) | (mask >= len(self._lookup))
        if is_wrong.any():
            wrong = mask[is_wrong].min()
            valid = np.flatnonzero((self._lookup >= 0) & (self._lookup != self._ignored))
            raise UserError(
                f"{mask_file} has label {wrong}; expected {valid[0]} to {valid[-1]} for "
                f"the {len(self.classes)} classes, or a label that is ignored"
            )
        return target if self._ignored < 0 else target.astype(np.uint8)

    def is_recoloured(self, index: int, target: ndarray) -> bool:
        """Return whether a mask gives a class of its target the colour of another one in the palette."""
        palette = read_image(self.files[index][1], lambda image: image.palette, ("PNG",))
        if not (palette and self.palette):
            return False
        colours = np.frombuffer(palette.getdata()[1], np.uint8).reshape(-1, 3).tolist()
        given = dict(zip(self._lookup, colours, strict=False))
        return any(
            number in target
            and given.get(number, colour) != colour
            and given[number] in self.palette
            for number, colour in enumerate(self.palette)
        )


def lookup(classes: int, first: int = 0, ignored: Sequence[int] = (IGNORE_INDEX,)) -> ndarray:
    """Return the table int16[256] or [65536] from raw label to class.

    Ignored labels have 255, or -1 where there are more than 255 classes; invalid ones -2.

    Args:
        classes: K; their raw labels are consecutive.
        first: Raw label of class 0.
        ignored: Raw labels of ignored pixels.
    """
    bits = 8 if max(first + classes - 1, *ignored, 0) < 2**8 else 16
    table = np.full(2**bits, -2, np.int16)
    table[first : first + classes] = np.arange(classes)
    table[list(ignored)] = ignore_index_of(classes)
    return table


def open_png(file: Path) -> Image.Image:
    """Return a decoded PNG, or raise a UserError that names it."""
    return read_image(file, lambda image: image.copy(), ("PNG",))


def read_png(file: Path, modes: tuple[str, ...], expected: str) -> ndarray:
    """Return the values of a PNG, or raise a UserError that names it.

    Args:
        file: The file.
        modes: PIL's modes that are allowed.
        expected: What they are, for the message.
    """
    image = open_png(file)
    if image.mode not in modes:
        raise UserError(f"{file} has mode {image.mode!r}; expected {expected}")
    return np.asarray(image)


def palette_of(dataset) -> ndarray:
    """Return the colours of the dataset, uint8[K, 3]; by default distinct hues in three brightnesses."""
    if getattr(dataset, "palette", None):
        return np.array(dataset.palette, np.uint8)
    shades = ((0.55, 0.95), (0.8, 0.8), (0.7, 0.6))  # saturation and brightness
    colours = [hsv_to_rgb(k * GOLDEN % 1, *shades[k % 3]) for k in range(len(dataset.classes))]
    return (255 * np.array(colours)).round().astype(np.uint8)
