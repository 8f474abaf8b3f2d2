"""Depth, normals and boundaries in the folder layout, see `folder.py`.

    ROOT/images/{training,validation}/NAME.jpg (or .png)
    ROOT/depth/{training,validation}/NAME.png              16-bit; metres = value x depth_scale, 0 = no value
    ROOT/targets.json                                      {"depth_scale": 0.001, "max_depth": 10.0}
    ROOT/normals/{training,validation}/NAME.png            8-bit RGB, n = 2 v / 255 - 1, black = no value
    ROOT/instances/{training,validation}/NAME.png          8- or 16-bit ids

Depth beyond `max_depth` metres (optional) counts as no value. Without the folder `instances`, boundaries are those of
the class map.
"""

from pathlib import Path

import numpy as np

from llava_bidir.common.errors import UserError

from .boundaries import InstanceBoundaries
from .depth import DepthDataset
from .file_layout import IMAGE_SUFFIXES, files_by_name, pair_files, read_json
from .normals import NormalsDataset

KEYS = ("depth_scale", "max_depth")


class FolderDepth(DepthDataset):
    """Depth maps in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a part is missing, an image has no depth map or a depth map no image, or targets.json is invalid.
    """

    def __init__(self, root: str | Path, split: str):
        settings_file = Path(root) / "targets.json"
        files = _pair(root, split, "depth", self.target_name)
        settings = _read_targets_json(settings_file) if settings_file.exists() else {}
        if "depth_scale" not in settings:
            raise UserError(
                f"{settings_file} has no depth_scale, the metres per unit of {next(iter(files.values()))[1]}; write "
                '{"depth_scale": 0.001} into it if depth is stored in millimetres'
            )
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
        super().__init__(_pair(root, split, "normals", self.target_name))


class FolderBoundaries(InstanceBoundaries):
    """Boundaries of instances in the layout above.

    Args:
        root: The folder.
        split: "training" or "validation".

    Raises:
        UserError: If a folder is missing, or an image has no instance map, or an instance map no image.
    """

    def __init__(self, root: str | Path, split: str):
        super().__init__(_pair(root, split, "instances", self.target_name))


def _pair(
    root: str | Path,
    split: str,
    folder: str,
    target_name: str,
) -> dict[str, tuple[Path, Path]]:
    """Return {name: (image, target)} of ROOT/images/SPLIT and ROOT/FOLDER/SPLIT."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"data.root: no folder {root}")
    images = files_by_name(root / "images" / split, IMAGE_SUFFIXES)
    return pair_files(
        images, files_by_name(root / folder / split, (".png",)), f"{root}, {split}", target_name
    )


def _read_targets_json(path: Path) -> dict[str, float]:
    """Return the settings of targets.json, or raise a UserError that names the file and the key."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f'{path} needs an object, e.g. {{"depth_scale": 0.001}}')
    if unknown := sorted(settings.keys() - set(KEYS)):
        raise UserError(f"{path} has the unknown key {unknown[0]!r}; expected {' and '.join(KEYS)}")
    for key, value in settings.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < np.float32(value) < np.inf
        ):
            raise UserError(f"{path}: {key} is {value!r}; expected a positive number of metres")
    return settings
