"""Locate the folder of a dataset and pair its images with their targets."""

import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_CHARACTERS = 10_000_000  # of a text file; VOC's list of 10,582 training images has 130,000


def find_root(root: str | Path, name: str, parts: tuple[str, ...]) -> Path:
    """Return the folder that contains all `parts`: `root`, or its subfolder `name` (may contain slashes).

    Raises:
        UserError: If neither does; the message lists the contents of `root` and suggests a folder.
    """
    root = Path(root)

    def is_dataset(folder):
        return all((folder / part).exists() for part in parts)

    for folder in (root, root / name):
        if is_dataset(folder):
            return folder
    if not root.is_dir():
        raise UserError(
            f"data.root: no folder {root}; expected the dataset's {name} with {', '.join(parts)}"
        )
    contents = sorted(path.name for path in root.iterdir())
    listing = ", ".join(contents[:8]) + (", ..." if len(contents) > 8 else "") or "nothing"
    missing = ", ".join(part for part in parts if not (root / part).exists())
    above = [folder for folder in root.absolute().parents[:3] if is_dataset(folder)]
    below = [
        folder
        for folder in sorted(root.glob("*/"))
        if is_dataset(folder) or is_dataset(folder / name)
    ]
    hint = "".join(f"; did you mean {folder}?" for folder in [*above, *below][:1])
    raise UserError(
        f"data.root: {root} lacks {missing}; expected the dataset's {name} with {', '.join(parts)}; "
        f"it contains {listing}{hint}"
    )


def files_by_name(
    folder: Path,
    suffixes: Iterable[str],
    ending: str = "",
    pattern: str = "*",
) -> dict[str, Path]:
    """Return {name: file}, sorted; a name is the file name without `ending` and suffix, with accents composed (NFC).

    Raises:
        UserError: If the folder does not exist, two files have the same name, or a name is not UTF-8.
    """
    if not folder.is_dir():
        parent = folder.parent
        siblings = sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []
        hint = (
            f"; {parent} contains {', '.join(siblings[:8]) or 'nothing'}" if parent.is_dir() else ""
        )
        raise UserError(f"no folder {folder}{hint}")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending):
            continue
        # macOS writes such beside each file, on disks of other systems
        if path.name.startswith("._"):
            continue
        # macOS stores accents apart
        name = unicodedata.normalize("NFC", path.stem.removesuffix(ending))
        if not _is_text(name):
            raise UserError(f"{str(path)!r} has a name that is not UTF-8; rename it")
        if name in files:
            raise UserError(f"{files[name]} and {path} have the same name; remove one")
        files[name] = path
    return dict(sorted(files.items()))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        raise UserError(f"{dataset}: no images ({', '.join(IMAGE_SUFFIXES)})")
    return {name: (image, targets[name]) for name, image in images.items()}


def read_text(path: Path) -> str:
    """Return the content of a small text file.

    Raises:
        UserError: If it is missing, not a regular file, not UTF-8, or too long.
    """
    if not path.is_file():
        raise UserError(
            f"{path} is missing" if not path.exists() else f"{path} is not a regular file"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:  # skips a byte order mark
            text = file.read(MAX_CHARACTERS + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path} has more than {MAX_CHARACTERS:,} characters")
    return text


def read_json(path: Path) -> Any:
    """Return the content of a small JSON file.

    Raises:
        UserError: As :func:`read_text`, or if it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
