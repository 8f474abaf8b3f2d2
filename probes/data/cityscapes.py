"""Cityscapes in its official layout, with the 19 evaluated classes.

    ROOT/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png
    ROOT/disparity/{train,val}/CITY/NAME_disparity.png             16-bit, of the task depth
    ROOT/camera/{train,val}/CITY/NAME_camera.json                  the same

There are 2,975 training and 500 validation images. Images of one city are correlated, so `groups` holds the cities.
Depth is baseline x focal length / disparity, and the disparity of a pixel is (value - 1) / 256; 0 is no measurement.
Source: Cordts et al., CVPR 2016; labels.py, README.md and csCalibration.pdf of cityscapesScripts.
"""

from pathlib import Path

import numpy as np
from numpy import ndarray

from llava_bidir.common.files import read_json

from .file_layout import files_by_name, find_root, pair_files
from .image_dataset import SegmentationDataset, lookup
from .targets import DepthDataset, read_16_bit

SPLITS = {"training": "train", "validation": "val"}
SIZES = {"training": 2975, "validation": 500}
LAST_ID = 33
# metres, as in published evaluations; a disparity of one step of 1 / 256 px would be 120 km
MAX_DEPTH = 80.0
ROWS = """
     7 road 804080,  8 sidewalk f423e8, 11 building 464646, 12 wall 66669c, 13 fence be9999, 17 pole 999999,
    19 traffic light faaa1e, 20 traffic sign dcdc00, 21 vegetation 6b8e23, 22 terrain 98fb98, 23 sky 4682b4,
    24 person dc143c, 25 rider ff0000, 26 car 00008e, 27 truck 000046, 28 bus 003c64, 31 train 005064,
    32 motorcycle 0000e6, 33 bicycle 770b20
"""
IDS = []
CLASSES = []
PALETTE = []
for _row in ROWS.split(","):
    _id, *_name, _colour = _row.split()
    IDS.append(int(_id))
    CLASSES.append(" ".join(_name))
    PALETTE.append(list(bytes.fromhex(_colour)))
LOOKUP = lookup(0, ignored=range(LAST_ID + 1))
LOOKUP[IDS] = np.arange(len(IDS))


class Cityscapes(SegmentationDataset):
    """Cityscapes with the fine annotations.

    Args:
        root: The folder with leftImg8bit and gtFine.
        split: "training" or "validation".

    Raises:
        UserError: If a folder is missing, or an image has no mask, or a mask no image.
    """

    def __init__(self, root: str | Path, split: str):
        root = find_root(root, "cityscapes", ("leftImg8bit", "gtFine"))
        images = _files_of(root, split, "leftImg8bit")
        masks = _files_of(root, split=split, folder="gtFine", ending="_gtFine_labelIds")
        files = pair_files(images, masks, f"{root}, {split}")
        super().__init__(files, CLASSES, LOOKUP, PALETTE, _cities(files))
        self.official_size = SIZES[split]


def _files_of(root: Path, split: str, folder: str, ending: str = "") -> dict[str, Path]:
    """Return the files of ROOT/FOLDER/SPLIT/CITY by name, without their ending, _FOLDER by default."""
    suffixes = (".png", ".json")
    return files_by_name(
        root / folder / SPLITS[split],
        suffixes=suffixes,
        ending=ending or f"_{folder}",
        pattern="*/*",
    )


def _cities(files: dict[str, tuple[Path, ...]]) -> list[str]:
    return [image.parent.name for image, *_ in files.values()]


class CityscapesDepth(DepthDataset):
    """Cityscapes with depth from the published disparity, up to 80 m.

    Args:
        root: The folder with leftImg8bit, disparity and camera.
        split: "training" or "validation".

    Raises:
        UserError: If a folder is missing, or an image has no disparity or camera, or the other way round.
    """

    parts = ("images", "disparity", "camera")
    target_name = "disparity map"

    def __init__(self, root: str | Path, split: str):
        folders = ("leftImg8bit", "disparity", "camera")
        root = find_root(root, "cityscapes", folders)
        images, disparity, cameras = (_files_of(root, split, folder) for folder in folders)
        pairs = pair_files(
            images, targets=disparity, dataset=f"{root}, {split}", target_name=self.target_name
        )
        pair_files(images, targets=cameras, dataset=f"{root}, {split}", target_name="camera")
        files = {name: (*pair, cameras[name]) for name, pair in pairs.items()}
        super().__init__(files, None, MAX_DEPTH, _cities(files))
        self.official_size = SIZES[split]

    def read_target(self, disparity_file: Path, camera_file: Path) -> ndarray:
        """Return the depth, float32[H, W] in metres, NaN where there is no value, or raise a UserError."""
        camera = read_json(camera_file)
        # in metres x pixels
        product = np.float32(camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"])
        values = read_16_bit(disparity_file)
        # 1 is infinitely far
        disparity = np.where(values > 1, (values - 1) / 256, np.nan)
        return self.limited(product / disparity)
