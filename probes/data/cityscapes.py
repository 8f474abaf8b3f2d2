"""Cityscapes in its official layout, with the 19 evaluated classes.

    ROOT/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png          or NAME_gtFine_labelTrainIds.png

There are 2,975 training and 500 validation images. Images of one city are correlated, so `groups` holds the cities.
Source: Cordts et al., CVPR 2016; labels.py of cityscapesScripts.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from llava_bidir.common.errors import UserError

from .base import IGNORE_INDEX, SegmentationDataset, lookup
from .file_layout import files_by_name, find_root, pair_files

SPLITS = {"training": "train", "validation": "val"}
SIZES = {"training": 2975, "validation": 500}
LAST_ID = 33
ROWS = """
     7 road 804080,  8 sidewalk f423e8, 11 building 464646, 12 wall 66669c, 13 fence be9999, 17 pole 999999,
    19 traffic light faaa1e, 20 traffic sign dcdc00, 21 vegetation 6b8e23, 22 terrain 98fb98, 23 sky 4682b4,
    24 person dc143c, 25 rider ff0000, 26 car 00008e, 27 truck 000046, 28 bus 003c64, 31 train 005064,
    32 motorcycle 0000e6, 33 bicycle 770b20
"""
IDS, CLASSES, PALETTE = [], [], []
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
        labels: Kind of masks: "labelIds", as published, or "labelTrainIds", as written by csCreateTrainIdLabelImgs.

    Raises:
        UserError: If a folder is missing, or an image has no mask, or a mask no image.
    """

    def __init__(self, root: str | Path, split: str, labels: Literal["labelIds", "labelTrainIds"] = "labelIds"):
        root = find_root(root, "cityscapes", ("leftImg8bit", "gtFine"))
        if split not in SPLITS:
            raise UserError(f"Cityscapes has the splits {', '.join(SPLITS)}, not {split!r}")
        images, masks = (root / part / SPLITS[split] for part in ("leftImg8bit", "gtFine"))
        ending = f"_gtFine_{labels}"
        mask_files = files_by_name(masks, (".png",), ending, "*/*")
        if not mask_files:
            raise UserError(
                f"{masks} has no CITY/*{ending}.png; csCreateTrainIdLabelImgs of cityscapesScripts creates "
                "labelTrainIds, and data.options.labels selects the kind of masks"
            )
        files = pair_files(files_by_name(images, (".png",), "_leftImg8bit", "*/*"), mask_files, f"{root}, {split}")
        cities = [image.parent.name for image, _ in files.values()]
        table = _lookup_label_ids() if labels == "labelIds" else lookup(len(CLASSES))
        super().__init__(files, CLASSES, table, PALETTE, cities)
        self.official_size = SIZES[split]


def _lookup_label_ids() -> np.ndarray:
    """Return the table int16[256] from label id to class: 255 for ids that are not evaluated, -1 above the last id."""
    table = np.full(256, -1, np.int16)
    table[: LAST_ID + 1] = IGNORE_INDEX
    table[IDS] = np.arange(len(IDS))
    return table
