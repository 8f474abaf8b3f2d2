"""Locate the folder of a dataset and pair its images with their targets."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import SUFFIXES

OF_WINDOWS = ("Thumbs.db", "desktop.ini")
WHOLE = ""  # split: all photos of a folder without splits
SETTINGS = {  # of a folder's targets
    "annotations": 'classes.json  {"classes": ["wall", ...], "ignore_index": 255}',
    "depth": 'targets.json  {"depth_scale": 0.001}',
}


def find_root(root: str | Path, name: str, parts: tuple[str, ...]) -> Path:
    """Return the folder that contains all `parts`: `root`, or its subfolder `name` (may contain slashes).

    Raises:
        UserError: If neither does.
    """
    root = Path(root)
    for folder in (root, root / name):
        missing = [part for part in parts if not (folder / part).exists()]
        if not missing:
            return folder
    raise UserError(
        f"data.root: {root} lacks {', '.join(parts)}, which the dataset's {name} contains"
    )


def files_by_name(
    folder: Path, suffixes: Iterable[str], ending: str = "", pattern: str = "*"
) -> dict[str, Path]:
    """Return {name: file}, sorted; a name is the file name without `ending` and suffix, with accents composed (NFC).

    Raises:
        UserError: If the folder does not exist, or two files have the same name. By the default pattern, also names a
            file of another kind, or a folder, which would be left out.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    unread: list[Path] = []
    for path in sorted(folder.glob(pattern)):
        # macOS writes ._NAME beside each file, on disks of other systems
        if path.name.startswith(".") or path.name in OF_WINDOWS:
            continue
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending):
            unread.append(path)
            continue
        # macOS stores accents apart
        name = unicodedata.normalize("NFC", path.stem.removesuffix(ending))
        if name in files:
            raise UserError(f"{files[name]} and {path} have the same name; remove one")
        files[name] = path
    if unread and pattern == "*":
        raise UserError(
            f"{unread[0]} would not be read, one of {len(unread)}: expected {', '.join(suffixes)} files in {folder}, "
            "and no folders; convert or move it"
        )
    return dict(sorted(files.items()))


def pair_files(
    images: dict[str, Path], targets: dict[str, Path], dataset: str, target_name: str = "mask"
) -> dict[str, tuple[Path, Path]]:
    """Return {name: (image, target)}.

    Raises:
        UserError: If an image has no target, a target no image, or there are no images; names `dataset` and the target.
    """
    for files, partners, kind in ((images, targets, target_name), (targets, images, "image")):
        unpaired = sorted(set(files) - set(partners))
        if unpaired:
            raise UserError(
                f"{dataset}: {len(unpaired)} files have no {kind}, e.g. {files[unpaired[0]]}"
            )
    if not images:
        raise UserError(f"{dataset}: no images ({', '.join(SUFFIXES)})")
    return {name: (image, targets[name]) for name, image in images.items()}


def pair_folders(
    root: str | Path, split: str, folder: str, target_name: str = "mask"
) -> dict[str, tuple[Path, Path]]:
    """Return the pairs of ROOT/images/SPLIT and ROOT/FOLDER/SPLIT, or of a folder without splits.

    Raises:
        UserError: A folder is missing, or there are splits where all photos are asked for; or as of
            :func:`files_by_name` and :func:`pair_files`.
    """
    root = Path(root)
    if split == WHOLE:
        if (root / "images/training").is_dir():
            raise UserError(f"{root} has splits of its own; leave out --validation")
        folders = find_pairs(root, folder)
    else:
        folders = root / "images" / split, root / folder / split
    if folders is None or not all(part.is_dir() for part in folders):
        raise UserError(describe_layout(root, folder, target_name))
    if folders[0] == folders[1]:
        pattern = "*.*"  # other files are not photos
        photos = [suffix for suffix in SUFFIXES if suffix != ".png"]
    else:
        pattern = "*"
        photos = SUFFIXES
    images = files_by_name(folders[0], photos, pattern=pattern)
    targets = files_by_name(folders[1], (".png",), pattern=pattern)
    dataset = f"{root}, {split}" if split else str(root)
    return pair_files(images, targets=targets, dataset=dataset, target_name=target_name)


def find_pairs(root: Path, folder: str) -> tuple[Path, Path] | None:
    """Return the folders of photos and of targets where there are no splits: one folder if they are side by side."""
    names = ("annotations", "masks") if folder == "annotations" else (folder,)
    for name in names:
        if (root / "images").is_dir() and (root / name).is_dir():
            return root / "images", root / name
    if folder == "annotations" and any(path.suffix.lower() == ".png" for path in root.glob("*.*")):
        return root, root
    return None


def describe_layout(root: Path, folder: str, target_name: str) -> str:
    """Return what is missing of a folder of photos and targets, with all that is expected, at once."""
    parts = [
        f"{kind}/{split}" for split in ("training", "validation") for kind in ("images", folder)
    ]
    missing = [part for part in parts if not (root / part).is_dir()]
    masks = "masks" if folder == "annotations" else folder
    lines = [
        f"{root} lacks {', '.join(missing)}; expected a photo and its {target_name} under one name:",
        f"images/training/NAME.jpg, {folder}/training/NAME.png, and the same of validation",
        f"or, without splits, images/NAME.jpg and {masks}/NAME.png"
        + ", or NAME.jpg beside NAME.png," * (folder == "annotations")
        + " with --validation 0.3, a share of them; --groups REGEX keeps frames of a video together",
    ]
    if folder in SETTINGS:
        lines.append(f"and {SETTINGS[folder]}")
    if len(missing) == len(parts) and find_pairs(root, folder) is not None:
        lines.append(f"{root} looks like a folder without splits: add --validation 0.3")
    return "\n  ".join(lines)
