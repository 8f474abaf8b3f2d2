"""NYU Depth V2 as the official labelled set, in the folders of BTS's conversion.

    ROOT/{train,test}/SCENE/rgb_00002.jpg             640 x 480 px
    ROOT/{train,test}/SCENE/sync_depth_00002.png      16-bit, millimetres, 0 = no value

`extract_official_train_test_set_from_mat.py` of cleinc/bts writes them from nyu_depth_v2_labeled.mat and splits.mat.
Depth is the sensor's (rawDepths), not inpainted. There are 795 training and 654 test images; these are the validation
split. Source: Silberman et al., ECCV 2012. probe3d scores the same 654 images, but reads them from a pickled file.
"""

from pathlib import Path

from llava_bidir.common.errors import UserError

from .depth import DepthDataset
from .file_layout import files_by_name, find_root, pair_files

SPLITS = {"training": "train", "validation": "test"}
SIZES = {"training": 795, "validation": 654}
SCALE = 0.001  # BTS multiplies metres by 1000
MAX_DEPTH = 10.0  # metres; probe3d and BTS leave out what is farther


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
        if split not in SPLITS:
            raise UserError(f"NYUv2 has the splits {', '.join(SPLITS)}, not {split!r}")
        folder = root / SPLITS[split]
        images = _by_number(files_by_name(folder, (".jpg", ".png"), pattern="*/rgb_*"))
        depth = _by_number(files_by_name(folder, (".png",), pattern="*/sync_depth_*"))
        super().__init__(
            pair_files(images, depth, f"{root}, {split}", "depth map"), SCALE, MAX_DEPTH
        )
        self.official_size = SIZES[split]


def _by_number(files: dict[str, Path]) -> dict[str, Path]:
    """Return {"00002": file} of files such as rgb_00002.jpg and sync_depth_00002.png."""
    return {name.rpartition("_")[2]: file for name, file in files.items()}
