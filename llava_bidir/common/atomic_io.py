"""Files and folders that are whole or not there: after a kill, a full disk or a power cut the one before counts.

What is being written ends in .partial. It is on disk before it takes its name, for a file system may keep the name and
lose the contents; then the name is put on disk too.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import UserError
from .run_lock import exclusive_run_lock

PARTIAL, REPLACED = ".partial", ".replaced"
AGAIN = "mend that and give the same command again"


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """What to write instead of `path`; it takes that name when the block ends, and goes when the block fails.

    Raises:
        UserError: The operating system refused: the disk is full, or read-only.
    """
    partial = partial_path(path)
    with wrap_os_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            _sync(partial)
            partial.replace(path)
            _sync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)  # on a full disk, room for others
            raise


@contextmanager
def atomic_directory(path: Path, mark: str) -> Iterator[Path]:
    """The same for a folder, which one process at a time can replace.

    Args:
        path: The folder.
        mark: Name of a file in it that tells it from any other folder: only such a one is replaced.

    Raises:
        UserError: There is another folder, another process writes it, or the operating system refused.
    """
    partial = partial_path(path)
    if path.exists() and not (path / mark).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} is there and holds no {mark}: it is something else, and is not replaced; move it away")
    with exclusive_run_lock(path.parent, path.name), wrap_os_errors(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            commit_directory(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def commit_directory(path: Path) -> None:
    """Puts the folder `path`.partial on disk and renames it to `path`.

    A folder cannot replace another in one step: the old one is renamed first and deleted last, so that at every moment
    one whole folder is there.
    """
    partial, replaced = partial_path(path), path.with_name(path.name + REPLACED)
    with ThreadPoolExecutor(16) as pool:  # thousands of small files share the disk's waiting
        list(pool.map(_sync, [*partial.rglob("*"), partial]))
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_files(contents: Mapping[Path, Any]) -> None:
    """Writes files that belong together, so that a reader sees each of them whole or not at all.

    All are written and on the disk before the first takes its name; until then those of before stay. The last one is
    not there while the others take theirs: it says that all are of one kind.

    Args:
        contents: By path: tensors by name for a .safetensors, what JSON has for a .json, else text or bytes.

    Raises:
        UserError: One cannot be written: the disk is full or read-only. What was there before is as it was.
    """
    *others, last = contents
    partials = {path: partial_path(path) for path in contents}
    path = last
    try:
        for path, partial in partials.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(partial, path.suffix, contents[path])
        if others:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            partial.replace(path)
        for folder in {path.parent for path in contents}:
            _sync(folder)  # the names too
    except (OSError, SafetensorError) as error:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()  # on a full disk, room for others
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path} was not written: {why}; {AGAIN}") from None


def _write(path: Path, suffix: str, content: Any) -> None:
    if suffix == ".safetensors":
        save_file({name: x.detach().cpu().contiguous() for name, x in content.items()}, path)
    else:
        text = json.dumps(content, indent=1) + "\n" if suffix == ".json" else content
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def wrap_os_errors(path: Path) -> Iterator[None]:
    """What the operating system refuses inside is a ValueError that names `path`; other errors pass."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        raise UserError(f"{path} was not written: {refusal}; {AGAIN}") from error


def _refusal(error: BaseException | None) -> str | None:
    """What the operating system said, if `error` comes from there. Libraries in Rust and C++ repeat it in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return str(error)
        if "(os error " in str(error) or "iostream error" in str(error):
            return str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
