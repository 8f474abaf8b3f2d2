"""Write files and folders atomically: after a kill or on a full disk the previous version is intact.

Data is written under a name that ends in .partial, which is then renamed. A lock lets one process at a time write a
folder.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import UserError, did_you_mean, error_context

PARTIAL = ".partial"
REPLACED = ".old"
# Reasons of the operating system for which a user's disk or folder takes nothing
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def partial_path(path: Path) -> Path:
    """Return the temporary name under which `path` is written."""
    return path.with_name(path.name + PARTIAL)


FREE_SPACE = "free space, or choose another folder"


@contextmanager
def names_full_disk(path: Path, advice: str = FREE_SPACE) -> Iterator[None]:
    """Name what the block writes if the disk is full, or the folder cannot be written.

    Libraries hide the system's error: torch raises another one, safetensors quotes it.

    Raises:
        UserError: `path` cannot be written.
    """
    try:
        yield
    except Exception as error:
        errors = (error, error.__context__)
        said = f"{errors}"
        reasons = [text for text in map(os.strerror, DISK_ERRORS) if text in said]
        if not reasons or any(isinstance(x, UserError) for x in errors):
            raise
        raise UserError(f"cannot write {path}: {reasons[0]}; {advice}") from error


@contextmanager
def atomic_write(path: Path, advice: str = FREE_SPACE) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` when the block ends, and deleted when the block fails."""
    partial = partial_path(path)
    with names_full_disk(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)  # frees the space on a full disk
            raise


def check_new(file: Path, suffix: str, overwrite: bool) -> None:
    """Raise a UserError if a file to be written has another suffix, or exists and may not be replaced."""
    if file.suffix != suffix:
        raise UserError(f"{file}: expected a file name that ends in {suffix}")
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists; --overwrite true replaces it")


@contextmanager
def atomic_directory(path: Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends; one process at a time can do so.

    Args:
        path: The folder.
        marker: Name of a file in the folder. An existing folder without this file is not replaced.

    Raises:
        UserError: `path` is something else, the folder that the process is in, or another process writes it.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise UserError(
            f"{path} is the folder that you are in, which would be replaced by another; choose a folder inside it"
        )
    partial = partial_path(path)
    is_empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not is_empty and not (path / marker).is_file():
        raise UserError(
            f"{path} exists and contains no {marker}, so it is not replaced; move it or choose another path"
        )
    with exclusive_run_lock(path.parent, path.name), names_full_disk(path):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            commit_directory(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def commit_directory(path: Path) -> None:
    """Rename the folder `path`.partial to `path`; its files can be read by all who may enter it.

    A folder cannot replace another one in a single step. The old folder is renamed first and deleted last, so that a
    complete folder exists at every moment.
    """
    partial = partial_path(path)
    replaced = path.with_name(path.name + REPLACED)
    for file in filter(Path.is_file, partial.rglob("*")):
        if file.stat().st_nlink == 1:  # else also a file of somebody's elsewhere
            file.chmod(0o644)  # safetensors writes 0600; who may enter is the umask's matter
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def write_files(contents: Mapping[Path, Any]) -> None:
    """Write files that belong together; readers see a complete version of each file.

    All files are complete before the first one is renamed. The last file does not exist while the others are renamed,
    so its presence shows that all files are of the same version.

    Args:
        contents: Content by path: tensors by name for .safetensors, or these and the metadata; a JSON value for .json,
            else text or bytes. A function is called with the SHA-256 of the other files by name, and returns the
            content.
    """
    *others, last = contents
    partials = {path: partial_path(path) for path in contents}
    try:
        for path in sorted(contents, key=lambda path: callable(contents[path])):
            content = contents[path]
            if callable(content):
                hashes = {file.name: sha256(partials[file]) for file in contents if file != path}
                content = content(hashes)
            with names_full_disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(partials[path], path.suffix, content)
        if others:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            partial.replace(path)
    except BaseException:
        for partial in partials.values():
            partial.unlink(missing_ok=True)  # frees the space on a full disk
        raise


def _write(path: Path, suffix: str, content: Any) -> None:
    if suffix == ".safetensors":
        from safetensors.torch import save  # imports torch, which `demo` and others do not need

        metadata = None
        if isinstance(content, tuple):
            content, metadata = content
        tensors = {name: x.detach().cpu().contiguous() for name, x in content.items()}
        content = save(tensors, metadata)
    elif suffix == ".json":
        content = to_json(content)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)


def to_json(value: Any) -> str:
    """Return a value as JSON, with null for NaN and infinities: JSON has none, and readers other than Python's fail."""
    return json.dumps(_null_unless_finite(value), indent=1) + "\n"


def _null_unless_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _null_unless_finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_null_unless_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: The file cannot be read, or is not UTF-8, not JSON, or not an object.
    """
    with error_context(file):
        content = json.loads(file.read_text(encoding="utf-8-sig"))  # skips a byte order mark
        if not isinstance(content, dict):
            raise UserError(f"contains a {type(content).__name__}; expected an object {{...}}")
    return content


def read_settings(file: Path, keys: Sequence[str], example: str) -> dict[str, Any]:
    """Return the object in a JSON file that users write.

    Args:
        file: The file.
        keys: All keys that it may have.
        example: Content, for the message.

    Raises:
        UserError: There is no such file, it has another key, or as :func:`read_json`.
    """
    if not file.is_file():
        raise UserError(f"{file} needs to be there, as {example}")
    settings = read_json(file)
    for key in settings:
        if key not in keys:
            meant = did_you_mean(key, keys)
            raise UserError(f"{file} has the key {key!r}; expected {', '.join(keys)}{meant}")
    return settings


@contextmanager
def exclusive_run_lock(folder: Path, result: str = "", wait_s: float = 1.0) -> Iterator[None]:
    """Hold the lock FOLDER/.lock, or FOLDER/.RESULT.lock for a single result, while the block runs.

    It waits for another process, by default as long as one that is exiting may take. The OS releases the lock when the
    process exits, even after SIGKILL; a stale lock file does not block later runs.

    Raises:
        UserError: Another process holds the lock, or the folder is not writable.
    """
    file = folder / ".lock"
    if result:
        file = folder / f".{result}.lock"
    lock = FileLock(file, timeout=wait_s)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder / result} is in use by another process; wait until it has ended, or write to another folder"
        ) from None
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; choose another folder") from None
    try:
        yield
    finally:
        with suppress(OSError):
            # while the lock is held: filelock checks that the locked file still exists
            file.unlink()
        lock.release()


def is_in_use(folder: Path) -> bool:
    """Return whether a process of this machine holds a lock of the folder."""
    for file in folder.glob(".*lock"):
        try:
            with FileLock(file, timeout=0):
                pass
        except Timeout:
            return True
    return False
