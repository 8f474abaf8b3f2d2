"""Targets that are read from PNG files, in any layout: depth, normals and boundaries."""

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy import ndarray

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import sha256
from llava_bidir.common.imports import check_returned, check_shape, name_of
from probes.ops.geometry import ignored_label
from probes.tasks import Task

from .image_dataset import IGNORE_INDEX, ImageDataset, SegmentationDataset, read_png

# A channel of a normal is n = 2 v / 255 - 1: truncation changes it by less than 2 / 255, and the length by less than
# sqrt(3) times that.
LENGTH_TOLERANCE = 2 * 3**0.5 / 255
BOUNDARY_CLASSES = ["interior", "boundary"]


class DepthDataset(ImageDataset):
    """Images with depth: targets are float32[H, W] in metres, NaN where there is no value.

    Args:
        files: {name: (image, depth)}, in the order of the dataset.
        scale: Metres per unit.
        max_depth: Larger values count as no value, in metres; None for no limit.
        groups: The cluster of each image (e.g. its city), or None.

    Raises:
        UserError: On access, if an image or depth map is invalid.
    """

    task = "depth"
    parts = ("images", "depth")
    target_name = "depth map"

    def __init__(
        self,
        files: dict[str, tuple[Path, ...]],
        scale: float | None = None,
        max_depth: float | None = None,
        groups: list[str] | None = None,
    ):
        super().__init__(files, groups=groups)
        self.scale = scale
        self.max_depth = max_depth

    def identity(self) -> dict[str, str]:
        """Return what the split is: its images, depth maps, and how their values are read."""
        return super().identity() | {"depth_values": f"x {self.scale}, at most {self.max_depth} m"}

    def read_target(self, depth_file: Path) -> ndarray:
        """Return the depth, float32[H, W] in metres, NaN where there is no value, or raise a UserError."""
        depth = read_16_bit(depth_file)
        depth[depth == 0] = np.nan
        return self.limited(depth * np.float32(self.scale))

    def limited(self, depth: ndarray) -> ndarray:
        """Return the depth with NaN where it exceeds the limit."""
        limit = np.inf if self.max_depth is None else self.max_depth
        return np.where(depth <= limit, depth, np.float32(np.nan))


def read_16_bit(file: Path) -> ndarray:
    """Return the values of a single-channel 16-bit PNG, float32[H, W], or raise a UserError that names the file."""
    # PIL reads some 16-bit PNG files as I
    values = read_png(
        file, ("I;16", "I"), "16-bit values, one per pixel (mode I;16), not a picture of them"
    )
    return values.astype(np.float32)


class NormalsDataset(ImageDataset):
    """Images with the unit normal of the visible surface for each pixel, from 8-bit RGB files.

    Targets are float32[H, W, 3], NaN where there is no value. Axes: x to the right, y down, z towards the viewer. A
    wall that faces the camera is (0, 0, 1), a floor (0, -1, 0).

    Black pixels have no value. (0, 0, 0) would be a vector of length sqrt(3), which no normal has, and DSINE reads
    NYUv2 in the same way (data/datasets/nyuv2/__init__.py of baegwangbin/DSINE). Grey (128, 128, 128) is almost the
    vector 0, which is no direction; it is an error.

    Args:
        files: {name: (image, normals)}, in the order of the dataset.

    Raises:
        UserError: On access, if an image is invalid, or a normal map is not 8-bit RGB, has vectors that are not of unit
            length, or points away from the viewer in most pixels.
    """

    task = "normals"
    parts = ("images", "normals")
    target_name = "normal map"

    def read_target(self, normals_file: Path) -> ndarray:
        """Return the normals, float32[H, W, 3], NaN where there is no value, or raise a UserError."""
        values = read_png(normals_file, ("RGB",), "8-bit RGB, n = 2 v / 255 - 1 in each channel")
        valid = values.any(-1)
        normals = values.astype(np.float32) * np.float32(2 / 255) - 1
        length = np.linalg.norm(normals, axis=-1)
        if (wrong := valid & (abs(length - 1) > LENGTH_TOLERANCE)).any():
            row, column = np.argwhere(wrong)[0]
            raise UserError(
                f"{normals_file}: {values[row, column].tolist()} in row {row}, column {column} is a vector of length "
                f"{length[row, column]:.3f}, expected 1 (n = 2 v / 255 - 1); write unit vectors, and (0, 0, 0) where "
                f"there is no value ({wrong.sum():,} of {valid.sum():,} pixels)"
            )
        # no camera sees most surfaces from behind
        if (normals[valid][:, 2] < 0).sum() > valid.sum() / 2:
            raise UserError(
                f"{normals_file}: most normals point away from the viewer; expected x to the right, y down, z towards "
                "the viewer; negate the vectors, or z alone, as your data requires"
            )
        normals /= length[..., None]
        normals[~valid] = np.nan
        return normals


class InstanceBoundaries(ImageDataset):
    """Images with boundaries between instances: targets are uint8[H, W].

    Args:
        files: {name: (image, ids)}, in the order of the dataset. Ids are 8- or 16-bit PNG files; 0 is an id, too.

    Raises:
        UserError: On access, if an image or a map of ids is invalid.
    """

    task = "boundaries"
    parts = ("images", "instances")
    target_name = "instance map"

    def __init__(self, files: dict[str, tuple]):
        super().__init__(files, BOUNDARY_CLASSES)

    def read_target(self, ids_file: Path) -> ndarray:
        """Return the boundaries, uint8[H, W], or raise a UserError that names the file."""
        modes = ("L", "P", "I;16", "I")
        return find_boundaries(read_png(ids_file, modes, "8- or 16-bit ids, one per pixel"))


class DerivedTargets(ImageDataset):
    """Images with targets that are made from those of another dataset.

    Args:
        dataset: The dataset.
        classes: Names of the classes; none if targets are real numbers.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str]):
        self.dataset = dataset
        self.parts = dataset.parts
        self.target_name = dataset.target_name
        self.official_size = dataset.official_size
        files = dict(zip(dataset.names, dataset.files, strict=True))
        super().__init__(files, classes, groups=dataset.groups)


class TaskTargets(DerivedTargets):
    """Images with what a task of a user's file makes of the targets of a dataset.

    Args:
        dataset: The dataset.
        task: The task.
    """

    def __init__(self, dataset: ImageDataset, task: Task):
        classes = task.classes
        if task.loss and not classes:
            classes = dataset.classes
        super().__init__(dataset, classes)
        self._task = task

    def identity(self) -> dict[str, str]:
        """Return what the split is: its images, its targets, and the file that makes others of them."""
        return self.dataset.identity() | {"task": sha256(Path(inspect.getfile(type(self._task))))}

    def read_target(self, *files: Path) -> ndarray:
        """Return the target of the task, or raise a UserError that names the file or the task's function."""
        read = self.dataset.read_target(*files)
        function = self._task.read
        target = check_returned(function, function(read), ndarray)
        kinds = ["float32"]
        if self._task.loss:
            kinds = ["uint8", "uint16"]  # of more than 255 classes
        if target.dtype.name not in kinds:
            expected = " or ".join(kinds)
            raise UserError(f"{name_of(function)} returned {target.dtype}; expected {expected}")
        return check_shape(function, target, (*read.shape[:2], *target.shape[2:]))


class ClassBoundaries(DerivedTargets):
    """Images with boundaries between the classes of a segmentation dataset: targets are uint8[H, W].

    Pixels are ignored if they or a neighbour that decides are.

    Args:
        dataset: The segmentation dataset, in any layout.
    """

    task = "boundaries"

    def __init__(self, dataset: SegmentationDataset):
        super().__init__(dataset, BOUNDARY_CLASSES)

    def read_target(self, mask_file: Path) -> ndarray:
        """Return the boundaries, uint8[H, W], or raise a UserError that names the file."""
        labels = self.dataset.read_target(mask_file)
        return find_boundaries(labels, labels == ignored_label(labels))


def find_boundaries(ids: ndarray, ignored: ndarray | None = None) -> ndarray:
    """Return for each pixel 1 at a boundary, 0 elsewhere, 255 where ignored, uint8[H, W].

    A pixel is at a boundary if its right, lower or lower right neighbour has another id. Boundaries are one pixel wide
    and shifted by half a pixel towards the origin. Source: seg2bmap.m of the Berkeley segmentation benchmark (BSDS),
    which the benchmarks of SBD and DAVIS use. ::

        ids   1 1 2    boundaries   0 1 0
              1 1 2                 1 1 1
              3 3 3                 0 0 0

    Args:
        ids: Integer [H, W].
        ignored: bool[H, W], pixels without an id; a pixel that is compared with one is ignored.
    """
    boundaries = np.any([ids != near for near in _neighbours(ids)], axis=0).astype(np.uint8)
    if ignored is not None:
        boundaries[np.any([ignored, *_neighbours(ignored)], axis=0)] = IGNORE_INDEX
    return boundaries


def _neighbours(values: ndarray) -> tuple[ndarray, ...]:
    """Return the right, lower and lower right neighbour of each pixel; beyond an edge those are of the pixels at it."""
    padded = np.pad(values, (0, 1), mode="edge")
    return padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
