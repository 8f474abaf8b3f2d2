"""Depth maps: metric depth for each pixel, from 16-bit PNG files."""

from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from .base import BadFile, File, ImageDataset, check_sizes, open_image

MISSING = "depth map without a value"


class DepthDataset(ImageDataset):
    """Images with depth: targets are float32[H, W] in metres, NaN where there is no value.

    Args:
        files: {name: (image, depth)}, in the order of the dataset.
        scale: Metres per unit.
        max_depth: Larger values count as no value, in metres; None for no limit.
        groups: The cluster of each image (e.g. its city), or None.

    Raises:
        BadFile: On access, if an image or depth map is invalid.
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
        super().__init__(files, [], groups=groups)
        self.scale = scale
        self.max_depth = max_depth

    def identity(self) -> dict[str, str]:
        """Return what the split is: its images, depth maps, and how their values are read."""
        return super().identity() | {"depth_values": f"x {self.scale}, at most {self.max_depth} m"}

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        depth_file: File,
    ) -> ndarray:
        """Return the depth, float32[H, W] in metres, NaN where there is no value, or raise a BadFile."""
        depth = read_16_bit(depth_file).astype(np.float32)
        depth[depth == 0] = np.nan
        depth *= np.float32(self.scale)
        check_sizes(
            image,
            depth.shape[::-1],
            image_file,
            depth_file,
            self.target_name,
        )
        return limit_depth(depth, self.max_depth, depth_file)


def limit_depth(depth: ndarray, max_depth: float | None, file: File) -> ndarray:
    """Return the depth with NaN where it exceeds the limit, or raise a BadFile if no value is left."""
    if np.isnan(depth).all():
        raise BadFile(
            f"{file} has no value in any pixel; remove it and its image, or write depth into it",
            MISSING,
        )
    if max_depth is not None:
        depth[depth > max_depth] = np.nan
        if np.isnan(depth).all():
            raise BadFile(
                f"{file} has no value up to the limit of {max_depth} m; check the scale of its values, or the limit",
                MISSING,
            )
    return depth


def read_16_bit(file: File) -> ndarray:
    """Return the values of a single-channel 16-bit PNG, uint16[H, W], or raise a BadFile that names the file."""
    image = open_image(file, ("PNG",))
    if image.mode not in ("I;16", "I"):  # PIL reads some 16-bit PNG files as I
        advice = {
            "L": "this file has 8 bits, too few for depth; save it as uint16",
            "P": "this file has a palette; save the values as uint16",
            "RGB": "these are colours; save the values themselves as uint16, not a picture of them",
            "RGBA": "these are colours; save the values themselves as uint16, not a picture of them",
        }.get(image.mode, "save it as 16-bit greyscale PNG")
        raise BadFile(
            f"{file} has mode {image.mode!r}, expected one 16-bit value per pixel (mode I;16): {advice}",
            "file that is not 16-bit values",
        )
    return np.asarray(image).astype(np.uint16)
