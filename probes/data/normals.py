"""Normal maps: the unit normal of the visible surface for each pixel, from 8-bit RGB PNG files.

Axes: x to the right, y down, z towards the viewer. A wall that faces the camera is (0, 0, 1), a floor (0, -1, 0).
"""

import numpy as np
from numpy import ndarray
from PIL import Image

from .base import BadFile, File, ImageDataset, check_sizes, open_image

# A channel is n = 2 v / 255 - 1: truncation changes it by less than 2 / 255, and the length by less than
# sqrt(3) times that.
LENGTH_TOLERANCE = 2 * 3**0.5 / 255


class NormalsDataset(ImageDataset):
    """Images with surface normals: targets are float32[H, W, 3], unit vectors, NaN where there is no value.

    Black pixels have no value. (0, 0, 0) would be a vector of length sqrt(3), which no normal has, and DSINE reads
    NYUv2 in the same way (data/datasets/nyuv2/__init__.py of baegwangbin/DSINE). Grey (128, 128, 128) is almost the
    vector 0, which is no direction; it is an error.

    Args:
        files: {name: (image, normals)}, in the order of the dataset.

    Raises:
        BadFile: On access, if an image or normal map is invalid.
    """

    task = "normals"
    parts = ("images", "normals")
    target_name = "normal map"

    def __init__(self, files: dict[str, tuple]):
        super().__init__(files, [])

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        normals_file: File,
    ) -> ndarray:
        """Return the normals, float32[H, W, 3], NaN where there is no value, or raise a BadFile."""
        encoded = open_image(normals_file, ("PNG",))
        check_sizes(image, encoded.size, image_file, normals_file, self.target_name)
        return decode_normals(encoded, normals_file)


def decode_normals(encoded: Image.Image, file: File) -> ndarray:
    """Return the unit vectors of an RGB image, float32[H, W, 3], NaN where it is black.

    Raises:
        BadFile: If the image is not 8-bit RGB, is black, has vectors that are not of unit length, or points away from
            the viewer in most pixels.
    """
    if encoded.mode != "RGB":
        raise BadFile(
            f"{file} has mode {encoded.mode!r}, expected 8-bit RGB with n = 2 v / 255 - 1 in each channel",
            "file that is not 8-bit RGB",
        )
    values = np.asarray(encoded)
    valid = values.any(-1)
    if not valid.any():
        raise BadFile(
            f"{file} is black, which means no value in any pixel; remove it and its image",
            "no value",
        )
    normals = values.astype(np.float32) * np.float32(2 / 255) - 1
    length = np.linalg.norm(normals, axis=-1)
    if (wrong := valid & (abs(length - 1) > LENGTH_TOLERANCE)).any():
        row, column = np.argwhere(wrong)[0]
        raise BadFile(
            f"{file}: {values[row, column].tolist()} in row {row}, column {column} is a vector of length "
            f"{length[row, column]:.3f}, expected 1 (n = 2 v / 255 - 1); write unit vectors, and (0, 0, 0) where there "
            f"is no value ({wrong.sum():,} of {valid.sum():,} pixels)",
            "normals that are not unit vectors",
        )
    # no camera sees most surfaces from behind
    if (away := (normals[valid][:, 2] < 0).mean()) > 0.5:
        raise BadFile(
            f"{file}: {away:.0%} of the normals point away from the viewer; expected x to the right, y down, z towards "
            "the viewer; negate the vectors, or z alone, as your data requires",
            "normals that point away from the viewer",
        )
    normals /= length[..., None]
    normals[~valid] = np.nan
    return normals
