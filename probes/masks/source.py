"""What a source of masks has: names of classes, photos, and of each photo a map of classes or regions that may overlap.

Legend: H W pixels. A class is its name in the source; `UNLABELLED` and `IGNORED` stand for none.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from numpy import ndarray

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import SUFFIXES
from probes.data.image_dataset import EmbeddedFile

IGNORED, UNLABELLED = -1, -2
MOST_ID = 65_535  # of a 16-bit PNG
SPLIT_NAMES = {
    "train": "training",
    "training": "training",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
Size = tuple[int, int]  # width and height, px
ClassName = str | int  # a class, UNLABELLED or IGNORED


class Region(NamedTuple):
    """Pixels of one object.

    Args:
        name: Its class.
        mask: bool[H, W].
        is_crowd: Many objects that nobody separated.
    """

    name: str
    mask: ndarray
    is_crowd: bool = False


class LabelMap(NamedTuple):
    """The class of each pixel: names, and which of them, int[H, W]."""

    numbers: ndarray
    names: list[ClassName]


class AnnotatedPhoto(NamedTuple):
    """A photo and what is annotated on it.

    Args:
        name: Of the files that are written for it.
        image: File, or a function that returns it.
        read: Returns the annotation, regions in the order of the source, from the size of the image; raises a UserError
            that names what cannot be read.
        size: Width and height that the annotation says, None if it does not.
        split: "training", "validation", "test", which is left out, or "" where the source has none.
    """

    name: str
    image: Path | Callable[[], Path | EmbeddedFile]
    read: Callable[[Size], LabelMap | list[Region]]
    size: Size | None = None
    split: str = ""

    @property
    def image_name(self) -> str:
        """Return the path of the image."""
        return str(self.image) if isinstance(self.image, Path) else self.name

    def open(self) -> Path | EmbeddedFile:
        """Return the file of the image, or its bytes."""
        return self.image if isinstance(self.image, Path) else self.image()


@dataclass
class MaskSource:
    """Annotated photos in one format.

    Args:
        names: Of the classes.
        files: Those that hold the annotations.
        photos: Photos and their annotations.
        leaves_pixels_unlabelled: Whether some pixels may have no annotation.
        colour_of: Red, green and blue of each class, if it has one.
    """

    names: list[str]
    files: list[Path]
    photos: list[AnnotatedPhoto] = field(default_factory=list)
    leaves_pixels_unlabelled: bool = True
    colour_of: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class ImageFolder:
    """Images anywhere in a folder."""

    root: Path

    @cached_property
    def files(self) -> list[Path]:
        """Return the images, in order."""
        return [file for file in sorted(self.root.rglob("*")) if file.suffix.lower() in SUFFIXES]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        files: dict[str, list[Path]] = {}
        for file in self.files:
            files.setdefault(file.name, []).append(file)
        return files

    def find(self, name: str) -> Path:
        """Return the image that an annotation names: at its path in the folder, else anywhere in it.

        Raises:
            UserError: There is none, or several.
        """
        inside = parts_inside(name)
        file = self.root.joinpath(*inside)
        if file.is_file():
            return file
        files = self._by_name.get(file.name, [])
        if len(files) != 1:
            raise UserError(
                f"names the image {name!r}: {len(files)} files of that name in {self.root}; --images DIR says where "
                "images are"
            )
        return files[0]


def check_ids(names: dict[int, str]) -> list[str]:
    """Return the names of classes in the order of their ids.

    Raises:
        UserError: An id is none of a mask of 16 bits.
    """
    for number, name in names.items():
        if not 0 <= number <= MOST_ID:
            raise UserError(f"the class {name} has the id {number}; expected 0 to {MOST_ID}")
    return [name for _, name in sorted(names.items())]


def parts_inside(name: str) -> list[str]:
    """Return the parts of a path that a source names, of which none leads out of a folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return [part for part in parts if part not in ("/", "..")]


def photo_name(name: str | Path) -> str:
    """Return the name of a photo's files from its path in the source, without the folder of a split."""
    *folders, file = parts_inside(str(name))
    kept = [folder for folder in folders if folder.lower() not in SPLIT_NAMES]
    return "_".join([*kept, PurePosixPath(file).stem])


def split_of(name: str | Path) -> str:
    """Return the split that a folder on a path names, "" if none does."""
    splits = [SPLIT_NAMES.get(part.lower(), "") for part in parts_inside(str(name))]
    return next(filter(None, reversed(splits)), "")
