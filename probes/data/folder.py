"""A folder of images and PNG masks, in the layout of ADE20K.

    ROOT/images/{training,validation}/NAME.jpg (or .png)
    ROOT/annotations/{training,validation}/NAME.png       8-bit, one class index per pixel
    ROOT/classes.json                                     {"classes": ["wall", ...], "ignore_index": 255}

"ignore_index" can be a list of labels. A class whose label is ignored is none: no probe predicts it.
With `"reduce_zero_label": true` in classes.json, label 0 is ignored and classes start at 1, as in the files of ADE20K.
`"palette": [[r, g, b], ...]` sets the colours of the maps.
"""

from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError

from .base import IGNORE_INDEX, SegmentationDataset, lookup
from .file_layout import IMAGE_SUFFIXES, files_by_name, pair_files, read_json


class FolderDataset(SegmentationDataset):
    """Any dataset in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a part is missing, or an image has no mask, or a mask no image.
    """

    def __init__(self, root: str | Path, split: str):
        root = Path(root)
        settings = _read_classes_json(root / "classes.json")
        names = settings["classes"]
        first = int(settings.get("reduce_zero_label", False))
        ignored = _ignored_labels(settings)
        kept = [i for i in range(len(names)) if i + first not in ignored]
        table = lookup(len(names), first, (*ignored, *range(first)))
        for number, i in enumerate(kept):
            table[i + first] = number
        palette = settings.get("palette")
        super().__init__(
            image_and_annotation_folders(root, split),
            [names[i] for i in kept],
            table,
            palette and [palette[i] for i in kept],
        )


def image_and_annotation_folders(root: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """Return the pairs of ROOT/images/SPLIT and ROOT/annotations/SPLIT.

    Raises:
        UserError: As of `pair_files`, or if an image is in a folder below, where none is read.
    """
    folder = root / "images" / split
    images = files_by_name(folder, IMAGE_SUFFIXES)
    for path in sorted(folder.glob("*/**/*")):
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("._"):
            raise UserError(
                f"{path} is in a folder below {folder}, where no image is read; move images and masks up, or away"
            )
    return pair_files(
        images, files_by_name(root / "annotations" / split, (".png",)), f"{root}, {split}"
    )


def _read_classes_json(path: Path) -> dict:
    if not path.parent.is_dir():
        raise UserError(f"data.root: no folder {path.parent}")
    if not path.exists():
        raise UserError(
            f'{path} is missing; expected the names of the classes: {{"classes": ["wall", ...]}}'
        )
    settings = read_json(path)
    names = settings.get("classes") if isinstance(settings, dict) else None
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise UserError(f"{path} needs a list of names under 'classes'")
    if len(names) < 2:
        raise UserError(
            f"{path} has one class, which is right everywhere; name another one, such as the background"
        )
    if duplicates := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"{path} has the class {duplicates[0]!r} twice")
    ignored = _ignored_labels(settings)
    zero_ignored = settings.get("reduce_zero_label", False)
    for label in ignored:
        if type(label) is not int or label not in range(256):
            raise UserError(
                f"{path}: ignore_index is {label!r}; expected a label of an 8-bit mask (0 to 255), or a list of them"
            )
    if not isinstance(zero_ignored, bool):
        raise UserError(f"{path}: reduce_zero_label is {zero_ignored!r}; expected true or false")
    if len(names) > (most := IGNORE_INDEX - zero_ignored):
        raise UserError(f"{path} has {len(names)} classes; an 8-bit mask allows at most {most}")
    if len(names) - sum(i + zero_ignored in ignored for i in range(len(names))) < 2:
        raise UserError(
            f"{path}: fewer than two classes have a label that is not ignored (ignore_index)"
        )
    _check_palette(path, settings.get("palette"), len(names))
    return settings


def _ignored_labels(settings: dict) -> list:
    ignored = settings.get("ignore_index", IGNORE_INDEX)
    return ignored if isinstance(ignored, list) else [ignored]


def _check_palette(path: Path, palette: Any, classes: int) -> None:
    if palette is None:
        return
    if not isinstance(palette, list) or not all(
        isinstance(colour, list) and len(colour) == 3 for colour in palette
    ):
        raise UserError(f"{path} needs a list of colours [red, green, blue] under 'palette'")
    if not all(
        type(value) is int and value in range(256) for colour in palette for value in colour
    ):
        raise UserError(f"{path}: the colours under 'palette' must be integers from 0 to 255")
    if len(palette) != classes:
        raise UserError(f"{path}: {len(palette)} colours under 'palette' for {classes} classes")
