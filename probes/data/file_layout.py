"""Locate the folder of a dataset and pair its images with their targets."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.images import SUFFIXES

OF_WINDOWS = ("Thumbs.db", "desktop.ini")


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
    folder: Path,
    suffixes: Iterable[str],
    ending: str = "",
    pattern: str = "*",
) -> dict[str, Path]:
    """Return {name: file}, sorted; a name is the file name without `ending` and suffix, with accents composed (NFC).

    Raises:
        UserError: If the folder does not exist, or two files have the same name.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        is_kind = path.suffix.lower() in suffixes and not _is_of_system(path)
        if not is_kind or not path.stem.endswith(ending):
            continue
        # macOS stores accents apart
        name = unicodedata.normalize("NFC", path.stem.removesuffix(ending))
        if name in files:
            raise UserError(f"{files[name]} and {path} have the same name; remove one")
        files[name] = path
    return dict(sorted(files.items()))


def _is_of_system(path: Path) -> bool:
    """Return whether a file or folder is hidden or one of Windows; macOS writes ._NAME beside each file."""
    return path.name.startswith(".") or path.name in OF_WINDOWS


def all_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return :func:`files_by_name` of a folder of nothing else.

    Raises:
        UserError: As of :func:`files_by_name`, or names another file, or a folder, which would be left out.
    """
    files = files_by_name(folder, suffixes)
    others = [path for path in folder.iterdir() if not _is_of_system(path)]
    unread = sorted({*others} - {*files.values()})
    if unread:
        raise UserError(
            f"{unread[0]} would not be read, one of {len(unread)}: expected {', '.join(suffixes)} files in {folder}, "
            "and no folders; convert or move it"
        )
    return files


def pair_files(
    images: dict[str, Path],
    targets: dict[str, Path],
    dataset: str,
    target_name: str = "mask",
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
    root: str | Path,
    split: str,
    folder: str,
    target_name: str = "mask",
) -> dict[str, tuple[Path, Path]]:
    """Return the pairs of ROOT/images/SPLIT and ROOT/FOLDER/SPLIT.

    Raises:
        UserError: As of :func:`all_files` and :func:`pair_files`.
    """
    images = all_files(Path(root) / "images" / split, SUFFIXES)
    targets = all_files(Path(root) / folder / split, (".png",))
    return pair_files(images, targets, f"{root}, {split}", target_name)
