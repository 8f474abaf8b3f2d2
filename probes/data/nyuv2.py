"""NYU Depth V2 as the official labelled set, in the folders of BTS's conversion.

    ROOT/{train,test}/SCENE/rgb_00002.jpg             640 x 480 px
    ROOT/{train,test}/SCENE/sync_depth_00002.png      16-bit, millimetres, 0 = no value

`extract_official_train_test_set_from_mat.py` of cleinc/bts writes them from nyu_depth_v2_labeled.mat and splits.mat.
Depth is the sensor's (rawDepths), not inpainted. There are 795 training and 654 test images; these are the validation
split. Source: Silberman et al., ECCV 2012. probe3d scores the same 654 images, but reads them from a pickled file.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy import ndarray
from PIL import Image

from llava_bidir.common.errors import UserError

from .base import BadFile, File
from .depth import DepthDataset
from .file_layout import files_by_name, find_root, pair_files

SPLITS = {"training": "train", "validation": "test"}
SIZES = {"training": 795, "validation": 654}
SCALE = 0.001  # BTS multiplies metres by 1000
MAX_DEPTH = 10.0  # metres; probe3d and BTS leave out what is farther
EIGEN_CROP = (slice(45, 471), slice(41, 601))  # Eigen et al., NeurIPS 2014; without the white frame of the images
IMAGE_SHAPE = (480, 640)


class NYUv2Depth(DepthDataset):
    """NYUv2's labelled images with the depth of the sensor.

    Args:
        root: The folder with train and test, or its parent with official_splits.
        split: "training" or "validation".
        crop: Pixels that count: "none" for all, as in probe3d, or "eigen" for rows 45 to 470 and columns 41 to 600, as
            in BTS.

    Raises:
        UserError: If a folder is missing, or an image has no depth map, or a depth map no image.
    """

    def __init__(self, root: str | Path, split: str, crop: Literal["none", "eigen"] = "none"):
        root = find_root(root, "official_splits", ("train", "test"))
        if split not in SPLITS:
            raise UserError(f"NYUv2 has the splits {', '.join(SPLITS)}, not {split!r}")
        folder = root / SPLITS[split]
        images = _by_number(files_by_name(folder, (".jpg", ".png"), pattern="*/rgb_*"))
        depth = _by_number(files_by_name(folder, (".png",), pattern="*/sync_depth_*"))
        super().__init__(pair_files(images, depth, f"{root}, {split}", "depth map"), SCALE, MAX_DEPTH)
        self.crop, self.official_size = crop, SIZES[split]

    def identity(self) -> dict[str, str]:
        """Return what the split is: its images, depth maps, and which of their pixels count."""
        return super().identity() | {"crop": self.crop}

    def read_target(self, image: Image.Image, image_file: File, depth_file: File) -> ndarray:
        """Return the depth, float32[H, W] in metres, NaN where there is no value, or raise a BadFile."""
        depth = super().read_target(image, image_file, depth_file)
        if self.crop == "none":
            return depth
        if depth.shape != IMAGE_SHAPE:
            raise BadFile(
                f"{depth_file} is {depth.shape[1]} x {depth.shape[0]} px; the crop 'eigen' is defined on 640 x 480 px",
                "size that has no crop",
            )
        cropped = np.full_like(depth, np.nan)
        cropped[EIGEN_CROP] = depth[EIGEN_CROP]
        return cropped


def _by_number(files: dict[str, Path]) -> dict[str, Path]:
    """Return {"00002": file} of files such as rgb_00002.jpg and sync_depth_00002.png."""
    return {name.rpartition("_")[2]: file for name, file in files.items()}
