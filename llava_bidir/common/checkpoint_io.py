"""Commit checkpoints of several files, and find the latest valid checkpoint of a run.

An interrupted save leaves a name that ends in .partial, which never counts as a checkpoint; the previous checkpoint is
untouched. A checkpoint is a file (one process, DDP, FSDP2) or a directory (ZeRO). A directory is complete once it
contains `whole.json`, a manifest with the size of each file.
"""

import json
import logging
import shutil
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .atomic_io import REPLACED, commit_directory, partial_path
from .errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "whole.json"
LAST = "last.ckpt"  # in a run's checkpoints: where it was interrupted; always the newest one, or not there


def is_complete(checkpoint: str | None, result: Path) -> bool:
    """Return True if the result exists and is newer than the checkpoint."""

    def modified(path):
        return Path(path).stat().st_mtime_ns

    return result.is_file() and not (checkpoint and modified(checkpoint) > modified(result))


def commit_checkpoint_directory(path: Path, metadata: dict[str, Any]) -> None:
    """Write the manifest of `path`.partial, which is `metadata` and the file sizes, and rename it to `path`."""
    partial = partial_path(path)
    files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
    sizes = {str(file.relative_to(partial)): file.stat().st_size for file in files}
    (partial / MANIFEST).write_text(json.dumps({**metadata, "bytes": sizes}, indent=1) + "\n")
    commit_directory(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a ZeRO checkpoint.

    Raises:
        UserError: There is none, or a listed file is missing or has another size.
    """
    if defect := find_defect(path):
        raise UserError(
            f"checkpoint {path}: {defect}; use an earlier one, or `last` for the latest valid checkpoint"
        )
    return json.loads((path / MANIFEST).read_text())


def find_defect(path: Path) -> str | None:
    """Return why a checkpoint is incomplete, None if it is complete; reads file sizes and archive indices only."""
    if path.is_file():
        return None if zipfile.is_zipfile(path) else "the file is truncated or not a checkpoint"
    if not path.is_dir():
        return "no such file or directory"
    try:
        sizes = json.loads((path / MANIFEST).read_text())["bytes"]
    except (OSError, ValueError, KeyError):
        return f"no readable {MANIFEST}, which is written last"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or not of {size} bytes"
    return None


def verify_checksums(path: Path) -> str | None:
    """Return the first damaged part of a complete checkpoint, None if all checksums match.

    This reads all files, at some GB/s and core. torch.save writes checksums but torch.load ignores them, so that it
    loads a flipped bit.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.pt"))
    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(_verify_file, files)), None)


def _verify_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError, EOFError) as error:
        return f"{path.name} is damaged: {error}"  # in the archive's index
    return member and f"{path.name} is damaged: the checksum of {member} does not match"


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the latest valid checkpoint in `folder`, None if there is none; log the newer ones that are skipped."""
    checkpoints = [
        path for path in folder.glob("*") if path.name.removesuffix(REPLACED).endswith(".ckpt")
    ]
    for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        defect = find_defect(path) or verify_checksums(path)
        if defect is None:
            return path
        log.warning("skipping checkpoint %s: %s", path, defect)
    return None


def remove_superseded_last(folder: Path) -> None:
    """Remove `last.ckpt` if `folder` has a newer valid checkpoint; a link, which ModelCheckpoint can make, stays."""
    last = folder / LAST
    if not last.exists() or last.is_symlink():
        return
    age = last.stat().st_mtime_ns
    newer = [path for path in folder.glob("*.ckpt") if path.stat().st_mtime_ns > age]
    if all(find_defect(path) for path in newer):
        return
    if last.is_file():
        last.unlink()
        return
    (last / MANIFEST).unlink(missing_ok=True)  # first: what is left after a kill is no checkpoint
    shutil.rmtree(last)


def newest_checkpoint(run: Path) -> Path:
    """Return the newest valid checkpoint of a run's folder.

    Raises:
        UserError: There is none.
    """
    folder = run / "checkpoints"
    newest = latest_valid_checkpoint(folder)
    if newest is None:
        raise UserError(f"no valid checkpoint in {folder}; expected the folder of a run of `fit`")
    return newest


def resolve_ckpt_path(path: str | None, folder: Path) -> str | None:
    """Return the checkpoint for `--ckpt_path`: `last` is the latest valid one in `folder`, None if there is none.

    Raises:
        UserError: `path` is not a valid checkpoint; another one is proposed but never used instead.
    """
    if path == "last":
        latest = latest_valid_checkpoint(folder)
        if latest is None:
            return None
        log.info("resuming %s", latest)
        return str(latest)
    if path is not None and (defect := find_defect(Path(path)) or verify_checksums(Path(path))):
        latest = latest_valid_checkpoint(folder)
        raise UserError(
            f"checkpoint {path}: {defect}. The latest valid checkpoint in {folder} is {latest}"
        )
    return path
