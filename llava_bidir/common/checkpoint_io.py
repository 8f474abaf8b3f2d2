"""Commit checkpoints of several files, and find the latest valid checkpoint of a run.

An interrupted save leaves a name that ends in .partial, which never counts as a checkpoint; the previous checkpoint is
untouched. A checkpoint is a file (one process, DDP, FSDP2) or a directory (ZeRO).
"""

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

from .atomic_io import REPLACED, commit_directory, partial_path
from .errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "whole.json"  # in a directory, how it is sharded
LAST = "last.ckpt"  # in a run's checkpoints: where it was interrupted, or its final step


def is_complete(checkpoint: str | None, result: Path) -> bool:
    """Return True if the result exists and is newer than the checkpoint."""

    def modified(path):
        return Path(path).stat().st_mtime_ns

    return result.is_file() and not (checkpoint and modified(checkpoint) > modified(result))


def commit_checkpoint_directory(path: Path, metadata: dict[str, Any]) -> None:
    """Write the manifest of `path`.partial, and rename it to `path`."""
    (partial_path(path) / MANIFEST).write_text(json.dumps(metadata, indent=1) + "\n")
    commit_directory(path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a ZeRO checkpoint.

    Raises:
        UserError: There is none.
    """
    if defect := find_defect(path):
        raise UserError(
            f"checkpoint {path}: {defect}; use an earlier one, or `last` for the latest valid checkpoint"
        )
    return json.loads((path / MANIFEST).read_text())


def find_defect(path: Path) -> str | None:
    """Return why a checkpoint is incomplete, None if it is complete; reads the index of a file only."""
    if path.is_file():
        return None if zipfile.is_zipfile(path) else "the file is truncated or not a checkpoint"
    if not path.is_dir():
        return "no such file or directory"
    return None if (path / MANIFEST).is_file() else f"no {MANIFEST}, which is written last"


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the latest valid checkpoint in `folder`, None if there is none; log the newer ones that are skipped."""
    checkpoints = [
        path for path in folder.glob("*") if path.name.removesuffix(REPLACED).endswith(".ckpt")
    ]
    for path in sorted(checkpoints, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        defect = find_defect(path)
        if defect is None:
            return path
        log.warning("skipping checkpoint %s: %s", path, defect)
    return None


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
    if path is not None and (defect := find_defect(Path(path))):
        latest = latest_valid_checkpoint(folder)
        raise UserError(
            f"checkpoint {path}: {defect}. The latest valid checkpoint in {folder} is {latest}"
        )
    return path
