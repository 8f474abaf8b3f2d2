"""PASCAL VOC 2012 in its official layout, with the augmented training list.

    ROOT/JPEGImages/NAME.jpg
    ROOT/SegmentationClass/NAME.png             0 = background, 1 to 20, 255 = border, which is ignored
    ROOT/SegmentationClassAug/NAME.png          the same, made of the SBD annotations
    ROOT/ImageSets/Segmentation/{train,val}.txt and trainaug.txt or aug.txt

ROOT is VOCdevkit/VOC2012, VOCdevkit or the folder that has it. 1,464 training images, 10,582 in the augmented list,
1,449 validation images. Source: Everingham et al., IJCV 2015; Hariharan et al., ICCV 2011 (SBD).
"""

from pathlib import Path
from typing import Literal

from llava_bidir.common.errors import UserError

from .base import IGNORE_INDEX, SegmentationDataset, lookup
from .file_layout import find_root, read_text

SIZES = {"train": 1464, "trainaug": 10582, "val": 1449}
CLASSES = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


def _colour(label: int) -> list[int]:
    """VOC's own: the bits of the label, dealt in turn to red, green and blue from the highest bit on."""
    return [sum((label >> (3 * i + channel) & 1) << (7 - i) for i in range(3)) for channel in range(3)]


class VOC2012(SegmentationDataset):
    """VOCdevkit/VOC2012.

    Args:
        root: The folder VOC2012 or one above.
        split: "training" or "validation".
        train_list: "trainaug" as the paper has it, or "train" for the official 1,464.
        background: "ignore" for the paper's 20 classes, or "class" for 21 with the background first. Scores of the two
            cannot be compared.

    Raises:
        UserError: A part is missing, or a training image is in the validation list too.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        train_list: Literal["trainaug", "train"] = "trainaug",
        background: Literal["ignore", "class"] = "ignore",
    ):
        parts = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
        root = Path(root)
        root = find_root(root / "VOCdevkit" if (root / "VOCdevkit/VOC2012").is_dir() else root, "VOC2012", parts)
        chosen = {"training": train_list, "validation": "val"}
        if split not in chosen:
            raise UserError(f"VOC 2012 has the splits {', '.join(chosen)}, not {split!r}")
        names = _names(root, chosen[split])
        if split == "training" and (both := set(names) & set(_read_list(root, "val"))):
            raise UserError(f"{root}: {len(both)} images are in {train_list} and in val, {min(both)} for one")
        first = 1 if background == "ignore" else 0
        super().__init__(
            {name: (root / "JPEGImages" / f"{name}.jpg", _mask(root, name)) for name in names},
            CLASSES[first:],
            lookup(len(CLASSES) - first, first, (0, IGNORE_INDEX) if first else (IGNORE_INDEX,)),
            [_colour(label) for label in range(first, len(CLASSES))],
        )
        self.official_size = SIZES[chosen[split]]


def _names(root: Path, chosen: str) -> list[str]:
    """The images of a list, sorted; trainaug may also come as aug and train, as SBD's converters write them."""
    if chosen != "trainaug":
        return sorted(_read_list(root, chosen))
    lists = [name for name in ("trainaug", "aug") if _list_file(root, name).is_file()]
    if not lists or not (root / "SegmentationClassAug").is_dir():
        missing = "SegmentationClassAug" if lists else "ImageSets/Segmentation/trainaug.txt (or aug.txt)"
        raise UserError(
            f"{root} lacks {missing}: the augmented training set needs the masks of SBD as PNG and its list, which the "
            "usual converters (voc_aug) write; or train on the official 1,464 images: data.options.train_list: train"
        )
    both = ["trainaug"] if lists[0] == "trainaug" else ["aug", "train"]
    return sorted({name for entry in both for name in _read_list(root, entry)})


def _list_file(root: Path, name: str) -> Path:
    return root / "ImageSets/Segmentation" / f"{name}.txt"


def _read_list(root: Path, name: str) -> list[str]:
    file = _list_file(root, name)
    # some lists name the files, "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png", others the images
    names = [Path(line.split()[0]).stem for line in read_text(file).splitlines() if line.strip()]
    if not names:
        raise UserError(f"{file} names no image")
    if strange := [name for name in names if "\0" in name or len(name) > 200]:
        raise UserError(f"{file} names {strange[0][:40]!r}, which is no name of an image")
    return names


def _mask(root: Path, name: str) -> Path:
    """VOC's own mask where there is one: finer than SBD's, and with the border."""
    own = root / "SegmentationClass" / f"{name}.png"
    return own if own.is_file() else root / "SegmentationClassAug" / f"{name}.png"
