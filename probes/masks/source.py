"""What a source of masks gives: names of classes, photos, and of each photo a map of ids or regions that may overlap.

Legend: H W pixels. An id is a number of the source, whatever it numbers; `UNLABELLED` and `IGNORED` stand for none.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from numpy import ndarray

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import SUFFIXES
from probes.config import MasksOptions
from probes.data.image_dataset import EmbeddedFile

UNLABELLED, IGNORED = -1, -2
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


class AnnotatedPhoto(NamedTuple):
    """A photo and what is annotated on it.

    Args:
        name: Of the files that are written for it.
        split: "training", "validation", "test", which is left out, or "" where the source has none.
        image: File; None if the source has the bytes.
        annotation: What the source reads labels from.
        size: Width and height that the annotation says, None if it does not.
    """

    name: str
    split: str
    image: Path | None
    annotation: Any
    size: tuple[int, int] | None = None


class Region(NamedTuple):
    """Pixels of one object.

    Args:
        category: Its id.
        mask: bool[H, W].
        is_crowd: Many objects that nobody separated.
    """

    category: int
    mask: ndarray
    is_crowd: bool = False


class MaskSource(ABC):
    """Annotated photos in one format.

    Args:
        path: File or folder, or the hub id of a data set.
        split: That of all its photos; "" if the source has splits, or none.
        options: Of the command.

    Raises:
        UserError: The source cannot be read; names the file.
    """

    leaves_pixels_unlabelled = True
    classes: dict[int, str]  # names by id
    photos: list[AnnotatedPhoto]
    files: list[Path]  # that hold the annotations

    def __init__(self, path: str, split: str, options: MasksOptions):
        self.path = Path(path)
        self.split = split
        self.options = options
        self.photos = []

    @abstractmethod
    def read(self, photo: AnnotatedPhoto, size: tuple[int, int]) -> ndarray | list[Region]:
        """Return the id of each pixel, i32[H, W], or regions, in the order of the source.

        Args:
            photo: One of `photos`.
            size: Width and height of its image.

        Raises:
            UserError: The annotation cannot be read; names it.
        """

    def image_of(self, photo: AnnotatedPhoto) -> Path | EmbeddedFile:
        """Return the file of a photo."""
        return photo.image

    @cached_property
    def image_folder(self) -> Path:
        """Where images are: --images, else beside the annotations."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return self.options.images or folder

    @cached_property
    def _images_by_name(self) -> dict[str, list[Path]]:
        images: dict[str, list[Path]] = {}
        for file in sorted(self.image_folder.rglob("*")):
            if file.suffix.lower() in SUFFIXES:
                images.setdefault(file.name, []).append(file)
        return images

    def find_image(self, name: str) -> Path:
        """Return the image that an annotation names: at its path in the folder of images, else anywhere in it.

        Raises:
            UserError: There is none, or several.
        """
        inside = parts_inside(name)
        file = self.image_folder.joinpath(*inside)
        if file.is_file():
            return file
        named = self._images_by_name.get(inside[-1] if inside else "", [])
        if len(named) != 1:
            raise UserError(
                f"names the image {name!r}: {len(named)} files of that name in {self.image_folder}; "
                "--images DIR says where images are"
            )
        return named[0]


def parts_inside(name: str) -> list[str]:
    """Return the parts of a path that a source names, of which none leads out of a folder."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return [part for part in parts if part not in ("/", "..")]


def photo_name(name: str) -> str:
    """Return the name of a photo's files from its path in the source, without the folder of a split."""
    *folders, file = parts_inside(name)
    kept = [folder for folder in folders if folder.lower() not in SPLIT_NAMES]
    return "_".join([*kept, PurePosixPath(file).stem])


def split_of(name: str) -> str:
    """Return the split that a folder on a path names, "" if none does."""
    splits = [
        SPLIT_NAMES[part.lower()] for part in parts_inside(name) if part.lower() in SPLIT_NAMES
    ]
    return splits[-1] if splits else ""
