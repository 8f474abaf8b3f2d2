"""Checkpoints that are whole or not there, and the newest whole one of a run.

A save that is cut short, by kill -9 or by a full disk, leaves a name that ends in .partial and never counts as a
checkpoint; the one before it is untouched. A checkpoint is a file (one process, DDP) or a directory (ZeRO), whose
`whole.json` is written last and lists what belongs to it.
"""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

log = logging.getLogger(__name__)

PARTIAL, REPLACED = ".partial", ".replaced"
LISTING = "whole.json"
POSITION = "trained_micro_batches"  # InstructionData's key


def recount(checkpoint: dict[str, Any], before: int, now: int) -> None:
    """Turns the position in the epoch, counted in micro-batches of `before` samples over all devices, into one counted
    in those of `now`, in place. The optimizer's steps and the order of samples do not depend on it.

    Raises:
        ValueError: The position is in the middle of a new micro-batch.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    data = next(state for state in checkpoint.values() if isinstance(state, dict) and POSITION in state)
    for counts in (progress["total"], progress["current"], data):
        behind = counts.get("processed", 0) - counts.get("completed", 0)  # a callback saves before a batch is completed
        for key in counts:
            if counts[key] * before % now and key != "completed":
                raise ValueError(
                    f"the checkpoint is at sample {counts[key] * before} of its epoch, which {now} samples at a time "
                    "over all devices do not hit; change data.micro_batch_size or the number of devices"
                )
            counts[key] = counts[key] * before // now
        if "completed" in counts:
            counts["completed"] = counts["processed"] - behind


def check_same_run(saved: dict[str, Any], now: dict[str, Any], of: str, free: tuple[str, ...] = ()) -> None:
    """That a checkpoint is not gone on with as another run: half of each would be a model of no recipe at all.

    Args:
        saved: Settings of the run that wrote it.
        now: Those of this run.
        of: Where they are set: model or data.
        free: Those that change no result, or nothing that comes after a checkpoint.

    Raises:
        ValueError: One of them differs.
    """
    for key in now.keys() - set(free):
        if _plain(saved.get(key)) != _plain(now[key]):
            raise ValueError(
                f"the checkpoint is of a run with {of}.{key}={saved.get(key)!r}, this one has {now[key]!r}; go on with "
                "what it was started with, or start anew with another --out"
            )


def _plain(setting: Any) -> str:
    """The same for a tuple and a list, and for a folder that is spelled otherwise."""
    if isinstance(setting, str) and Path(setting).exists():
        setting = str(Path(setting).resolve())
    return json.dumps(setting, sort_keys=True, default=str)


class WholeCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints, written beside their name and then renamed.

    Lightning's own writes to memory, then to /tmp, and moves that across file systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_of(path)
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)  # on a full disk, room for others
            raise
        partial.replace(path)

    def load_checkpoint(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Raises:
            ValueError: It is ZeRO's, which this strategy cannot read.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"checkpoint {path} is a directory, from a run with ZeRO; add its configs/cluster/zero*.yaml"
            )
        return super().load_checkpoint(path, *args, **kwargs)


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def finish_directory(path: Path, facts: dict[str, Any]) -> None:
    """Lists the files of `path`.partial in its whole.json, beside `facts`, and renames it to `path`.

    A directory cannot replace another in one step: the old one is renamed first and deleted last, so that at every
    moment one whole checkpoint is there.
    """
    partial = partial_of(path)
    sizes = {
        str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()
    }
    for name in sizes:
        with (partial / name).open("rb") as file:
            os.fsync(file.fileno())
    (partial / LISTING).write_text(json.dumps({**facts, "bytes": sizes}, indent=1) + "\n")
    replaced = path.with_name(path.name + REPLACED)
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)


def read_listing(path: Path) -> dict[str, Any]:
    """whole.json of a ZeRO checkpoint.

    Raises:
        ValueError: There is none, or a file it lists is missing or has another size.
    """
    problem = what_is_wrong(path)
    if problem:
        raise ValueError(f"checkpoint {path}: {problem}; take an earlier one, or `last` for the newest whole one")
    return json.loads((path / LISTING).read_text())


def what_is_wrong(path: Path) -> str | None:
    """Why `path` is no whole checkpoint; None if it is one. Sizes and archive indices are read, not the tensors."""
    if path.is_file():
        return None if zipfile.is_zipfile(path) else "the file is cut short or no checkpoint"
    if not path.is_dir():
        return "no such file or directory"
    if (path / "latest_universal").is_file():
        return None  # what DeepSpeed's ds_to_universal writes last
    try:
        sizes = json.loads((path / LISTING).read_text())["bytes"]
    except (OSError, ValueError, KeyError):
        return f"no readable {LISTING}, which is written last"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or not of {size} bytes"
    return None


def newest_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none; says which newer ones it passes over."""
    found = [p for p in folder.glob("*") if p.name.removesuffix(REPLACED).endswith(".ckpt")]
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        problem = what_is_wrong(path)
        if problem is None:
            return path
        log.warning("passing over checkpoint %s: %s", path, problem)
    return None


def resolve(path: str | None, folder: Path) -> str | None:
    """The checkpoint that `--ckpt_path` names: `last` is the newest whole one in `folder`, None where there is none.

    Raises:
        ValueError: The one that is named is not whole; it is not replaced by another without asking.
    """
    if path == "last":
        found = newest_whole(folder)
        log.info("resuming %s", found) if found else log.info("no checkpoint in %s yet; starting anew", folder)
        return str(found) if found else None
    if path is not None:
        problem = what_is_wrong(Path(path))
        if problem:
            raise ValueError(f"--ckpt_path {path}: {problem}. The newest whole one in {folder}: {newest_whole(folder)}")
    return path
