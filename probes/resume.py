"""A run's checkpoints, whole or not there, and which one it goes on from."""

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from .writing import write_files

log = logging.getLogger(__name__)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written beside their name and then renamed. Lightning's own are written to /tmp, which may
    be another file system, and moved."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_files({Path(path): buffer.getbuffer()})


def is_whole(checkpoint: Path) -> bool:
    """Whether all of a file that `torch.save` wrote is there, and as it was written: each part has a checksum."""
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            return parts.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is not damaged, None if there is none; says which it passes over."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if is_whole(path):
            return path
        log.warning("%s is damaged; an earlier checkpoint is taken", path)
    return None


def checkpoint_of(name: str | None, folder: Path) -> Path | None:
    """The checkpoint that `--ckpt_path` names: `last` is the newest whole one in `folder`, None where there is none.

    Raises:
        ValueError: The one that is named is not there or damaged; no other is taken without asking.
    """
    if name == "last":
        return newest_whole(folder)
    if name is None or is_whole(Path(name)):
        return None if name is None else Path(name)
    problem = "is damaged" if Path(name).exists() else "is not there"
    raise ValueError(f"--ckpt_path {name} {problem}; the newest whole one in {folder} is {newest_whole(folder)}")
