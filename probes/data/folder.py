"""A folder of images and PNG masks, the layout of ADE20K:

    ROOT/images/{training,validation}/NAME.jpg (or .png)
    ROOT/annotations/{training,validation}/NAME.png       8-bit, one class index a pixel
    ROOT/classes.json                                     {"classes": ["wall", ...], "ignore_index": 255}

With `"reduce_zero_label": true` in classes.json, 0 stands for "no class" and the classes count from 1, as in ADE20K's
own files. `"palette": [[r, g, b], ...]` gives the maps their colours.
"""

import json
from pathlib import Path

from .layout import IMAGE_SUFFIXES, files_by_name, paired
from .pairs import IGNORE_INDEX, SegmentationDataset, lookup


class FolderDataset(SegmentationDataset):
    """Any dataset, laid out as above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        ValueError: A part is missing, or an image has no mask or the other way round.
    """

    def __init__(self, root: str | Path, split: str):
        root = Path(root)
        facts = _read_facts(root / "classes.json")
        zero_is_none = facts.get("reduce_zero_label", False)
        ignored = (facts.get("ignore_index", IGNORE_INDEX), *([0] if zero_is_none else []))
        super().__init__(
            image_and_annotation_folders(root, split),
            facts["classes"],
            lookup(len(facts["classes"]), first=int(zero_is_none), ignored=ignored),
            facts.get("palette"),
        )


def image_and_annotation_folders(root: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The pairs of ROOT/images/SPLIT and ROOT/annotations/SPLIT."""
    images = files_by_name(root / "images" / split, IMAGE_SUFFIXES)
    return paired(images, files_by_name(root / "annotations" / split, (".png",)), f"{root}, {split}")


def _read_facts(path: Path) -> dict:
    if not path.parent.is_dir():
        raise ValueError(f"data.root: no folder {path.parent}")
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f'{path} is missing; it names the classes: {{"classes": ["wall", ...]}}') from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("classes"), list) or not facts["classes"]:
        raise ValueError(f"{path} needs a list of names under 'classes'")
    if len(facts["classes"]) > IGNORE_INDEX:
        raise ValueError(f"{path} names {len(facts['classes'])} classes; an 8-bit mask can tell {IGNORE_INDEX} apart")
    if facts.get("ignore_index", IGNORE_INDEX) not in range(256):
        raise ValueError(f"{path}: ignore_index {facts['ignore_index']!r} is no label of an 8-bit mask (0 to 255)")
    if len(facts.get("palette") or facts["classes"]) != len(facts["classes"]):
        raise ValueError(f"{path}: {len(facts['palette'])} colours under 'palette' for {len(facts['classes'])} classes")
    return facts
