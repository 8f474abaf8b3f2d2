"""Boundaries of instances or classes: for each pixel 1 at a boundary, 0 elsewhere, 255 where ignored.

A pixel is at a boundary if its right, lower or lower right neighbour has another id. Boundaries are one pixel wide and
shifted by half a pixel towards the origin. Source: seg2bmap.m of the Berkeley segmentation benchmark (BSDS), which the
benchmarks of SBD and DAVIS use.

    ids   1 1 2    boundaries   0 1 0
          1 1 2                 1 1 1
          3 3 3                 0 0 0
"""

import numpy as np
from numpy import ndarray
from PIL import Image

from .base import (
    IGNORE_INDEX,
    BadFile,
    File,
    ImageDataset,
    SegmentationDataset,
    check_sizes,
    open_image,
)

CLASSES = ["interior", "boundary"]


class InstanceBoundaries(ImageDataset):
    """Images with boundaries between instances: targets are uint8[H, W].

    Args:
        files: {name: (image, ids)}, in the order of the dataset. Ids are 8- or 16-bit PNG files; 0 is an id, too.

    Raises:
        BadFile: On access, if an image or a map of ids is invalid.
    """

    task = "boundaries"
    parts = ("images", "instances")
    target_name = "instance map"

    def __init__(self, files: dict[str, tuple]):
        super().__init__(files, CLASSES)

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        ids_file: File,
    ) -> ndarray:
        """Return the boundaries, uint8[H, W], or raise a BadFile that names the file."""
        ids = open_image(ids_file, ("PNG",))
        check_sizes(image, ids.size, image_file, ids_file, self.target_name)
        if ids.mode not in ("L", "P", "I;16", "I"):
            raise BadFile(
                f"{ids_file} has mode {ids.mode!r}, expected one 8- or 16-bit id per pixel (mode L, P or I;16); "
                "convert colours to ids",
                "instance map that is not ids",
            )
        return find_boundaries(np.asarray(ids))


class ClassBoundaries(ImageDataset):
    """Images with boundaries between the classes of a segmentation dataset: targets are uint8[H, W].

    Pixels are ignored if they or a neighbour that decides are.

    Args:
        dataset: The segmentation dataset, in any layout.
    """

    task = "boundaries"

    def __init__(self, dataset: SegmentationDataset):
        self._dataset = dataset
        self.parts = dataset.parts
        self.target_name = dataset.target_name
        super().__init__(dict.fromkeys(dataset.names, ()), CLASSES, groups=dataset.groups)
        self.official_size = dataset.official_size

    def files(self, index: int) -> tuple[File, ...]:
        """Return the files of an image and its mask."""
        return self._dataset.files(index)

    def identity(self) -> dict[str, str]:
        """Return what the split is: its images and masks."""
        return self._dataset.identity()

    def digests(self, part: str) -> list[str]:
        """Return the checksums of its images or masks."""
        return self._dataset.digests(part)

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        mask_file: File,
    ) -> ndarray:
        """Return the boundaries, uint8[H, W], or raise a BadFile that names the file."""
        labels = self._dataset.read_target(image, image_file, mask_file)
        return find_boundaries(labels, labels == IGNORE_INDEX)


def find_boundaries(ids: ndarray, ignored: ndarray | None = None) -> ndarray:
    """Return the boundaries, uint8[H, W].

    Args:
        ids: Integer [H, W].
        ignored: bool[H, W], pixels without an id; a pixel that is compared with one is ignored.
    """
    boundaries = _compare(ids, np.not_equal).astype(np.uint8)
    if ignored is not None:
        boundaries[ignored | _compare(ignored, np.logical_or)] = IGNORE_INDEX
    return boundaries


def _compare(values: ndarray, compare: np.ufunc) -> ndarray:
    """Return for each pixel whether `compare` holds for it and its right, lower or lower right neighbour."""
    holds = np.zeros(values.shape, bool)
    holds[:, :-1] |= compare(values[:, :-1], values[:, 1:])
    holds[:-1] |= compare(values[:-1], values[1:])
    holds[:-1, :-1] |= compare(values[:-1, :-1], values[1:, 1:])
    return holds
