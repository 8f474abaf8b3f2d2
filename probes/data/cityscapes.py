"""Cityscapes in its official layout, with the 19 classes that count.

    ROOT/leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png          or NAME_gtFine_labelTrainIds.png

2,975 training and 500 validation images. Images come in drives through a city, so `groups` has the city of each.
Source: Cordts et al., CVPR 2016; labels.py of cityscapesScripts.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from llava_bidir.common.errors import UserError

from .base import IGNORE_INDEX, SegmentationDataset, lookup
from .file_layout import files_by_name, find_root, paired

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
    """leftImg8bit and gtFine.

    Args:
        root: The folder that has both.
        split: "training" or "validation".
        labels: Which masks: "labelIds", as published, or "labelTrainIds", as csCreateTrainIdLabelImgs writes them.

    Raises:
        UserError: A part is missing, or an image has no mask or the other way round.
    """

    def __init__(self, root: str | Path, split: str, labels: Literal["labelIds", "labelTrainIds"] = "labelIds"):
        root = find_root(root, "cityscapes", ("leftImg8bit", "gtFine"))
        if split not in SPLITS:
            raise UserError(f"Cityscapes has the splits {', '.join(SPLITS)}, not {split!r}")
        images, masks = (root / part / SPLITS[split] for part in ("leftImg8bit", "gtFine"))
        ending = f"_gtFine_{labels}"
        found = files_by_name(masks, (".png",), ending, "*/*")
        if not found:
            raise UserError(
                f"{masks} has no CITY/*{ending}.png; csCreateTrainIdLabelImgs of cityscapesScripts makes labelTrainIds "
                "of gtFine, data.options.labels says which are read"
            )
        files = paired(files_by_name(images, (".png",), "_leftImg8bit", "*/*"), found, f"{root}, {split}")
        cities = [image.parent.name for image, _ in files.values()]
        table = _lookup_of_ids() if labels == "labelIds" else lookup(len(CLASSES))
        super().__init__(files, CLASSES, table, PALETTE, cities)
        self.official_size = SIZES[split]


def _lookup_of_ids() -> np.ndarray:
    """int16[256]: class of each label id, 255 for the ids that do not count, -1 behind the last one."""
    table = np.full(256, -1, np.int16)
    table[: LAST_ID + 1] = IGNORE_INDEX
    table[IDS] = np.arange(len(IDS))
    return table
