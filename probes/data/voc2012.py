"""PASCAL VOC 2012 in its official layout, with the augmented training set.

    ROOT/JPEGImages/NAME.jpg
    ROOT/SegmentationClass/NAME.png             0 = background, 1 to 20, 255 = border, ignored
    ROOT/SegmentationClassAug/NAME.png          the same, converted from SBD
    ROOT/ImageSets/Segmentation/{train,val}.txt and trainaug.txt or aug.txt

ROOT is VOCdevkit/VOC2012, VOCdevkit or its parent folder. There are 1,464 training images, 10,582 with augmentation,
and 1,449 validation images. Source: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).
"""

from pathlib import Path
from typing import Literal

from llava_bidir.common.errors import UserError

from .file_layout import find_root
from .image_dataset import IGNORE_INDEX, SegmentationDataset, lookup

LIST = "ImageSets/Segmentation/{}.txt"
LISTS = ("train", "val")
SIZES = {"train": 1464, "trainaug": 10582, "val": 1449}
CLASSES = """
    background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
""".split()
PALETTE = [
    list(bytes.fromhex(colour))
    for colour in """
    000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000 408000
    c08000 400080 c00080 408080 c08080 004000 804000 00c000 80c000 004080
""".split()
]


class VOC2012(SegmentationDataset):
    """PASCAL VOC 2012 in the folder VOCdevkit/VOC2012.

    Args:
        root: VOC2012, VOCdevkit or its parent folder.
        split: "training" or "validation".
        train_list: "trainaug" as in the paper, or "train" for the official 1,464 images.
        background: "ignore" for the paper's 20 classes, or "class" for 21 with the background first. Their scores are
            not comparable.

    Raises:
        UserError: If a part is missing.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        train_list: Literal["trainaug", "train"] = "trainaug",
        background: Literal["ignore", "class"] = "ignore",
    ):
        name = "VOCdevkit/VOC2012" if (Path(root) / "VOCdevkit").is_dir() else "VOC2012"
        root = find_root(root, name, ("JPEGImages", "SegmentationClass", *map(LIST.format, LISTS)))
        lists = {"training": train_list, "validation": "val"}
        names = _image_names(root, lists[split])
        first = 1 if background == "ignore" else 0
        super().__init__(
            {name: (root / "JPEGImages" / f"{name}.jpg", _mask_file(root, name)) for name in names},
            CLASSES[first:],
            lookup(len(CLASSES) - first, first, (*range(first), IGNORE_INDEX)),
            PALETTE[first:],
        )
        self.official_size = SIZES[lists[split]]


def _image_names(root: Path, image_list: str) -> list[str]:
    """Return the images of a list, sorted; converters of SBD write trainaug either as such or as aug and train."""
    parts = [image_list]
    if image_list == "trainaug":
        lists = [name for name in ("trainaug", "aug") if (root / LIST.format(name)).is_file()]
        if not lists or not (root / "SegmentationClassAug").is_dir():
            raise UserError(
                f"{root} lacks SegmentationClassAug or ImageSets/Segmentation/trainaug.txt (or aug.txt): the augmented "
                "training set needs the masks of SBD as PNG and a list, as written by converters such as voc_aug; or "
                "train on the official 1,464 images: data.options.train_list: train"
            )
        parts = ["trainaug"] if "trainaug" in lists else ["aug", "train"]
    return sorted({name for part in parts for name in _read_list(root, part)})


def _read_list(root: Path, name: str) -> list[str]:
    # a line is NAME or "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"
    lines = (root / LIST.format(name)).read_text().splitlines()
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


def _mask_file(root: Path, name: str) -> Path:
    """Return VOC's own mask if it exists (it is finer than SBD's and has the border), else SBD's."""
    official = root / "SegmentationClass" / f"{name}.png"
    return official if official.is_file() else root / "SegmentationClassAug" / f"{name}.png"
