"""A folder of images and targets, in the layout of ADE20K.

    ROOT/images/{training,validation}/NAME.jpg (or .png, .tif, .webp, .bmp)
    ROOT/annotations/{training,validation}/NAME.png       8- or 16-bit, one class index per pixel
    ROOT/classes.json                                     {"classes": ["wall", ...], "ignore_index": 255}
    ROOT/depth/{training,validation}/NAME.png             16-bit; metres = value x depth_scale, 0 = no value
    ROOT/targets.json                                     {"depth_scale": 0.001, "max_depth": 10.0}
    ROOT/normals/{training,validation}/NAME.png           8-bit RGB, n = 2 v / 255 - 1, black = no value
    ROOT/instances/{training,validation}/NAME.png         8- or 16-bit ids

"ignore_index" can be a list of labels; by default it is 255, and 65535 where 255 is a class. A class whose label is
ignored is none: no probe predicts it.
With `"reduce_zero_label": true` in classes.json, label 0 is ignored and classes start at 1, as in the files of ADE20K.
`"palette": [[r, g, b], ...]` sets the colours of the maps. Depth beyond `max_depth` metres (optional) counts as no
value. Without the folder `instances`, boundaries are those of the class map. A folder without splits has
images/NAME.jpg and masks/NAME.png (or annotations/, depth/ ...), or NAME.jpg beside NAME.png.
"""

from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_settings

from .file_layout import pair_folders
from .image_dataset import IGNORE_INDEX, SegmentationDataset, lookup
from .targets import DepthDataset, InstanceBoundaries, NormalsDataset

LAST_LABEL = 65_535  # of a 16-bit mask
MOST_CLASSES = 32_766  # of targets, int16
CLASSES_KEYS = ("classes", "ignore_index", "reduce_zero_label", "palette")
TARGETS_KEYS = ("depth_scale", "max_depth")


class FolderDataset(SegmentationDataset):
    """Any dataset of classes in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a part is missing or classes.json invalid, or an image has no mask, or a mask no image.
    """

    def __init__(self, root: str | Path, split: str):
        files = pair_folders(root, split, "annotations")
        names, first, ignored, palette = _read_classes_json(Path(root) / "classes.json")
        kept = [i for i in range(len(names)) if i + first not in ignored]
        table = lookup(len(kept), first, (*ignored, *range(first + len(names))))
        for number, i in enumerate(kept):
            table[i + first] = number
        super().__init__(
            files, [names[i] for i in kept], table, palette and [palette[i] for i in kept]
        )


def _read_classes_json(path: Path) -> tuple[list[str], int, list[int], list | None]:
    """Return the names of the classes, the label of the first one, the ignored labels, and the palette."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{path} needs {what}")

    settings = read_settings(path, CLASSES_KEYS, '{"classes": ["wall", ...]}')
    names = settings.get("classes")
    first = settings.get("reduce_zero_label", False)
    ignored = settings.get("ignore_index", IGNORE_INDEX)
    if (
        "ignore_index" not in settings
        and isinstance(names, list)
        and len(names) + bool(first) > 255
    ):
        ignored = LAST_LABEL  # 255 is the label of a class
    if not isinstance(ignored, list):
        ignored = [ignored]
    palette = settings.get("palette")
    are_names = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    are_different = are_names and len({*names}) == len(names) > 1
    need(are_different, 'two or more different names in a list under "classes"')
    need(isinstance(first, bool), 'true or false under "reduce_zero_label"')
    need(
        all(type(label) is int and 0 <= label <= LAST_LABEL for label in ignored),
        f'a label of a mask (0 to {LAST_LABEL}) under "ignore_index", or a list of them',
    )
    need(len(names) <= MOST_CLASSES, f"at most {MOST_CLASSES} classes, and has {len(names)}")
    are_colours = isinstance(palette, list) and all(map(_is_colour, palette))
    need(
        palette is None or (are_colours and len(palette) == len(names)),
        f'a colour [red, green, blue] from 0 to 255 for each of {len(names)} classes under "palette"',
    )
    return names, int(first), ignored, palette


def _is_byte(value: Any) -> bool:
    return type(value) is int and value in range(256)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_byte, value))


class FolderDepth(DepthDataset):
    """Depth maps in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a part is missing, an image has no depth map or a depth map no image, or targets.json is invalid.
    """

    def __init__(self, root: str | Path, split: str):
        path = Path(root) / "targets.json"
        expected = (
            '{"depth_scale": 0.001, "max_depth": 10.0}, metres per unit and (optional) metres'
        )
        settings = read_settings(path, TARGETS_KEYS, expected)
        is_valid = "depth_scale" in settings
        for value in settings.values():
            is_valid &= type(value) in (int, float) and 1e-30 < value < 1e30
        if not is_valid:
            raise UserError(f"{path} is {settings}; expected positive numbers as in {expected}")
        files = pair_folders(root, split=split, folder="depth", target_name=self.target_name)
        super().__init__(files, settings["depth_scale"], settings.get("max_depth"))


class FolderNormals(NormalsDataset):
    """Normal maps in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a folder is missing, or an image has no normal map, or a normal map no image.
    """

    def __init__(self, root: str | Path, split: str):
        super().__init__(
            pair_folders(root, split=split, folder="normals", target_name=self.target_name)
        )


class FolderBoundaries(InstanceBoundaries):
    """Boundaries of instances in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a folder is missing, or an image has no instance map, or an instance map no image.
    """

    def __init__(self, root: str | Path, split: str):
        super().__init__(
            pair_folders(root, split=split, folder="instances", target_name=self.target_name)
        )
