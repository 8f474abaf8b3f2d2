"""NYU Depth V2 as the official labelled set, in the folders of BTS's conversion.

    ROOT/{train,test}/SCENE/rgb_00002.jpg             640 x 480 px
    ROOT/{train,test}/SCENE/sync_depth_00002.png      16-bit, millimetres, 0 = no value

`extract_official_train_test_set_from_mat.py` of cleinc/bts writes them from nyu_depth_v2_labeled.mat and splits.mat.
Depth is the sensor's (rawDepths), not inpainted. There are 795 training and 654 test images; these are the validation
split. Source: Silberman et al., ECCV 2012. probe3d scores the same 654 images, but reads them from a pickled file.

Of the test images, only rows 45 to 470 and columns 41 to 600 have a value: the crop of Eigen et al. (2014), in which
BTS, AdaBins, DINOv2, DINOv3 and probe3d score.
"""

from pathlib import Path

import numpy as np
from numpy import ndarray

from llava_bidir.common.errors import UserError

from .file_layout import files_by_name, find_root, pair_files
from .targets import DepthDataset

SPLITS = {"training": "train", "validation": "test"}
SIZES = {"training": 795, "validation": 654}
SCALE = 0.001  # BTS multiplies metres by 1000
MAX_DEPTH = 10.0  # metres; probe3d and BTS leave out what is farther
SHAPE = (480, 640)
CROP = (slice(45, 471), slice(41, 601))


class NYUv2Depth(DepthDataset):
    """NYUv2's labelled images with the depth of the sensor.

    Args:
        root: The folder with train and test, or its parent with official_splits.
        split: "training" or "validation".

    Raises:
        UserError: If a folder is missing, or an image has no depth map, or a depth map no image.
    """

    def __init__(self, root: str | Path, split: str):
        root = find_root(root, "official_splits", ("train", "test"))
        folder = root / SPLITS[split]
        images = _by_number(files_by_name(folder, (".jpg", ".png"), pattern="*/rgb_*"))
        depth = _by_number(files_by_name(folder, (".png",), pattern="*/sync_*"))
        super().__init__(
            pair_files(images, targets=depth, dataset=f"{root}, {split}", target_name="depth map"),
            SCALE,
            MAX_DEPTH,
        )
        self.official_size = SIZES[split]
        self.is_cropped = split == "validation"

    def read_target(self, depth_file: Path) -> ndarray:
        """Return the depth, float32[480, 640] in metres, NaN where there is no value, or raise a UserError."""
        depth = super().read_target(depth_file)
        if not self.is_cropped:
            return depth
        if depth.shape != SHAPE:
            raise UserError(
                f"{depth_file} is {depth.shape[1]} x {depth.shape[0]} px; expected 640 x 480 px"
            )
        scored = np.full_like(depth, np.nan)
        scored[CROP] = depth[CROP]
        return scored


def _by_number(files: dict[str, Path]) -> dict[str, Path]:
    """Return files by the end of their names: 00002 of rgb_00002.jpg and of sync_depth_00002.png."""
    return {name.rpartition("_")[2]: file for name, file in files.items()}
