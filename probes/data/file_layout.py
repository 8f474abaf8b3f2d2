"""Finding a dataset's files: where its folder is, and which mask belongs to which image."""

from collections.abc import Iterable
from pathlib import Path

from llava_bidir.common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
LONGEST = 10_000_000  # characters of a text file; the list of VOC's 10,582 training images has 130,000


def find_root(root: str | Path, name: str, parts: tuple[str, ...]) -> Path:
    """The folder that has all `parts`: `root` itself, or `name` (slashes allowed) below it.

    Raises:
        UserError: It is neither; says what is there, and where the dataset seems to begin.
    """
    root = Path(root)
    complete = lambda folder: all((folder / part).exists() for part in parts)
    for place in (root, root / name):
        if complete(place):
            return place
    if not root.is_dir():
        raise UserError(f"data.root: no folder {root}; expected the dataset's {name} with {', '.join(parts)}")
    there = sorted(entry.name for entry in root.iterdir())
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "") or "nothing"
    missing = ", ".join(part for part in parts if not (root / part).exists())
    above = [place for place in root.absolute().parents[:3] if complete(place)]
    below = [place for place in sorted(root.glob("*/")) if complete(place) or complete(place / name)]
    hint = "".join(f"; did you mean {place}?" for place in [*above, *below][:1])
    raise UserError(
        f"data.root: {root} lacks {missing}; expected the dataset's {name} with {', '.join(parts)}; "
        f"there is {shown}{hint}"
    )


def files_by_name(folder: Path, suffixes: Iterable[str], ending: str = "", pattern: str = "*") -> dict[str, Path]:
    """{name: file}, sorted; the name is the file's without `ending` and suffix.

    Raises:
        UserError: The folder is not there, or two files have the same name, or one that no report could show.
    """
    if not folder.is_dir():
        beside = sorted(entry.name for entry in folder.parent.iterdir()) if folder.parent.is_dir() else []
        there = f"; in {folder.parent} there is {', '.join(beside[:8]) or 'nothing'}" if folder.parent.is_dir() else ""
        raise UserError(f"no folder {folder}{there}")
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern)):
        if path.suffix.lower() not in suffixes or not path.stem.endswith(ending):
            continue
        name = path.stem.removesuffix(ending)
        if not _is_text(name):
            raise UserError(f"{str(path)!r} has a name that is not UTF-8; rename it")
        if name in found:
            raise UserError(f"{found[name]} and {path} have the same name; which one is meant?")
        found[name] = path
    return dict(sorted(found.items()))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def paired(images: dict[str, Path], masks: dict[str, Path], where: str) -> dict[str, tuple[Path, Path]]:
    """{name: (image, mask)}.

    Raises:
        UserError: A file without its partner, or no file at all; `where` says of what.
    """
    for names, other, what in ((images, masks, "mask"), (masks, images, "image")):
        lonely = sorted(set(names) - set(other))
        if lonely:
            raise UserError(f"{where}: {len(lonely)} files have no {what}, {names[lonely[0]]} for one")
    if not images:
        raise UserError(f"{where}: no images ({', '.join(IMAGE_SUFFIXES)})")
    return {name: (image, masks[name]) for name, image in images.items()}


def read_text(path: Path) -> str:
    """What a file of names holds.

    Raises:
        UserError: It is missing, no regular file, not UTF-8, or far too long to be one.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing" if not path.exists() else f"{path} is no regular file")
    try:
        with path.open(encoding="utf-8-sig") as file:  # with a byte order mark or without
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    if len(text) > LONGEST:
        raise UserError(f"{path} is longer than {LONGEST:,} characters")
    return text
