"""CamVid with SegNet's 11 classes: `--data.dataset camvid --data.root DIR --import dataset.py`."""

from pathlib import Path
from typing import Literal

import probes
from probes.data.file_layout import files_by_name, pair_files
from probes.data.image_dataset import lookup

CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist".split()
UNLABELLED = 11


class CamVid(probes.SegmentationDataset):
    def __init__(self, root, split, scored_on: Literal["val", "test"] = "val"):
        part = {"training": "train", "validation": scored_on}[split]
        images = files_by_name(Path(root) / part, (".png",))
        masks = files_by_name(Path(root) / f"{part}annot", (".png",))
        files = pair_files(images, masks, f"{root}, {split}")  # {name: (image, mask)}
        super().__init__(files, CLASSES, lookup(len(CLASSES), ignored=(UNLABELLED,)))


probes.register_dataset("camvid", CamVid)
