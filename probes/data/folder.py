"""A folder of images and PNG masks, the layout of ADE20K:

    ROOT/images/{training,validation}/NAME.jpg (or .png)
    ROOT/annotations/{training,validation}/NAME.png       8-bit, one class index a pixel
    ROOT/classes.json                                     {"classes": ["wall", ...], "ignore_index": 255}

With `"reduce_zero_label": true` in classes.json, 0 stands for "no class" and the classes count from 1, as in ADE20K's
own files. `"palette": [[r, g, b], ...]` gives the maps their colours.
"""

import json
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError

from .base import IGNORE_INDEX, SegmentationDataset, lookup
from .file_layout import IMAGE_SUFFIXES, files_by_name, paired, read_text


class FolderDataset(SegmentationDataset):
    """Any dataset, laid out as above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: A part is missing, or an image has no mask or the other way round.
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
        raise UserError(f"data.root: no folder {path.parent}")
    if not path.exists():
        raise UserError(f'{path} is missing; it names the classes: {{"classes": ["wall", ...]}}')
    text = read_text(path)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    names = facts.get("classes") if isinstance(facts, dict) else None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path} needs a list of names under 'classes'")
    if len(names) > IGNORE_INDEX:
        raise UserError(f"{path} names {len(names)} classes; an 8-bit mask can tell {IGNORE_INDEX} apart")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"{path} names the class {twice[0]!r} twice")
    ignored, zero_is_none = facts.get("ignore_index", IGNORE_INDEX), facts.get("reduce_zero_label", False)
    if type(ignored) is not int or ignored not in range(256):
        raise UserError(f"{path}: ignore_index {ignored!r} is no label of an 8-bit mask (0 to 255)")
    if not isinstance(zero_is_none, bool):
        raise UserError(f"{path}: reduce_zero_label is {zero_is_none!r}; expected true or false")
    _check_palette(path, facts.get("palette"), len(names))
    return facts


def _check_palette(path: Path, palette: Any, classes: int) -> None:
    if palette is None:
        return
    if not isinstance(palette, list) or not all(isinstance(colour, list) and len(colour) == 3 for colour in palette):
        raise UserError(f"{path} needs a list of colours [red, green, blue] under 'palette'")
    if not all(type(value) is int and value in range(256) for colour in palette for value in colour):
        raise UserError(f"{path}: the colours under 'palette' are whole numbers from 0 to 255")
    if len(palette) != classes:
        raise UserError(f"{path}: {len(palette)} colours under 'palette' for {classes} classes")
