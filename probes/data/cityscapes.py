"""Cityscapes in its official layout, with the 19 evaluated classes.

    ROOT/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png
    ROOT/disparity/{train,val}/CITY/NAME_disparity.png             16-bit, of the task depth
    ROOT/camera/{train,val}/CITY/NAME_camera.json                  the same

There are 2,975 training and 500 validation images. Images of one city are correlated, so `groups` holds the cities.
Depth is baseline x focal length / disparity, and the disparity of a pixel is (value - 1) / 256; 0 is no measurement.
Source: Cordts et al., CVPR 2016; labels.py, README.md and csCalibration.pdf of cityscapesScripts.
"""

import json
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from llava_bidir.common.errors import UserError

from .base import IGNORE_INDEX, BadFile, File, SegmentationDataset, check_sizes
from .depth import DepthDataset, limit_depth, read_16_bit
from .file_layout import files_by_name, find_root, pair_files, read_text

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
        images = root / "leftImg8bit" / SPLITS[split]
        masks = root / "gtFine" / SPLITS[split]
        mask_files = files_by_name(masks, (".png",), "_gtFine_labelIds", "*/*")
        files = pair_files(
            files_by_name(images, (".png",), "_leftImg8bit", "*/*"), mask_files, f"{root}, {split}"
        )
        cities = [image.parent.name for image, _ in files.values()]
        super().__init__(
            files,
            CLASSES,
            _lookup_label_ids(),
            PALETTE,
            cities,
        )
        self.official_size = SIZES[split]


def _lookup_label_ids() -> np.ndarray:
    """Return the table int16[256] from label id to class: 255 for ids that are not evaluated, -1 above the last id."""
    table = np.full(256, -1, np.int16)
    table[: LAST_ID + 1] = IGNORE_INDEX
    table[IDS] = np.arange(len(IDS))
    return table


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
        root = find_root(root, "cityscapes", ("leftImg8bit", "disparity", "camera"))
        kinds = (("leftImg8bit", ".png"), ("disparity", ".png"), ("camera", ".json"))
        images, disparity, cameras = (
            files_by_name(root / kind / SPLITS[split], (suffix,), f"_{kind}", "*/*")
            for kind, suffix in kinds
        )
        pairs = pair_files(images, disparity, f"{root}, {split}", self.target_name)
        pair_files(images, cameras, f"{root}, {split}", "camera")
        files = {name: (*pair, cameras[name]) for name, pair in pairs.items()}
        super().__init__(files, None, MAX_DEPTH, [image.parent.name for image in images.values()])
        self.official_size = SIZES[split]

    def read_target(
        self,
        image: Image.Image,
        image_file: File,
        disparity_file: File,
        camera_file: Path,
    ) -> ndarray:
        """Return the depth, float32[H, W] in metres, NaN where there is no value, or raise a BadFile."""
        values = read_16_bit(disparity_file)
        check_sizes(
            image,
            values.shape[::-1],
            image_file,
            disparity_file,
            self.target_name,
        )
        # 1 is infinitely far
        disparity = np.where(values > 1, (values.astype(np.float32) - 1) / 256, np.nan)
        return limit_depth(_metre_pixels(camera_file) / disparity, self.max_depth, disparity_file)


def _metre_pixels(camera_file: Path) -> np.float32:
    """Return baseline x focal length of a camera file, in metres x pixels, or raise a BadFile."""
    try:
        camera = json.loads(read_text(camera_file))
        product = np.float32(camera["extrinsic"]["baseline"] * camera["intrinsic"]["fx"])
    except UserError as error:
        raise BadFile(str(error), "cannot be read") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise BadFile(
            f"{camera_file} has no extrinsic.baseline and intrinsic.fx as numbers: {error!r}; use the published camera "
            "file",
            "cannot be read",
        ) from None
    if not 0 < product < np.inf:
        raise BadFile(
            f"{camera_file}: baseline x focal length is {product}; expected a positive number",
            "camera",
        )
    return product
