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
    photos, masks = root / "images" / split, root / folder / split
    if split == WHOLE:
        if (root / "images/training").is_dir():
            raise UserError(f"{root} has splits of its own; leave out --validation")
        photos, masks = folders_without_splits(root, folder)
    if not (photos.is_dir() and masks.is_dir()):
        settings = SETTINGS.get(folder, "no further file")
        raise UserError(
            f"{root} lacks images/{split} or {folder}/{split}; expected a photo and its {target_name} under one name:\n"
            f"  images/training/NAME.jpg, {folder}/training/NAME.png, and the same of validation\n"
            f"  or, with --validation 0.3, images/NAME.jpg and {folder}/ (or masks/) NAME.png, or NAME.jpg beside "
            f"NAME.png; --groups REGEX keeps frames of a video together\n  and {settings}"
        )
    pattern, suffixes = "*", SUFFIXES
    if photos == masks:  # other files are neither
        pattern, suffixes = "*.*", [suffix for suffix in SUFFIXES if suffix != ".png"]
    images = files_by_name(photos, suffixes, pattern=pattern)
    targets = files_by_name(masks, (".png",), pattern=pattern)
    dataset = f"{root}, {split}" if split else str(root)
    return pair_files(images, targets=targets, dataset=dataset, target_name=target_name)


def folders_without_splits(root: Path, folder: str) -> tuple[Path, Path]:
    """Return the folders of photos and of targets where there are no splits: one folder if they are side by side."""
    for name in (folder, "masks") if folder == "annotations" else (folder,):
        if (root / name).is_dir():
            return root / "images", root / name
    return root, root
