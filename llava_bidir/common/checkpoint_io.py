"""Checkpoints that are whole or not there, and the newest whole one of a run.

A save that is cut short, by kill -9 or by a full disk, leaves a name that ends in .partial and never counts as a
checkpoint; the one before it is untouched. A checkpoint is a file (one process, DDP) or a directory (ZeRO), whose
`whole.json` is written last and lists what belongs to it.
"""

import json
import logging
import pickletools
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from .atomic_io import REPLACED, atomic_write, commit_directory, partial_path
from .errors import UserError
from .hf_loading import check_pickle, error_context

log = logging.getLogger(__name__)

LISTING = "whole.json"
# What ZeRO's files hold beside tensors and plain data. DeepSpeed loads them as pickles, which could call anything.
STAGES = "deepspeed.runtime.zero.config.ZeroStageEnum"
STAGE_NAMES = ("disabled", "optimizer_states", "gradients", "weights")
DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    STAGES,
    "deepspeed.utils.tensor_fragment.fragment_address",
)
GETATTR = ("builtins.getattr", "__builtin__.getattr")
GETATTR_STEPS = [("GLOBAL", name.replace(".", " ")) for name in GETATTR]


def is_complete(checkpoint: str | None, result: Path) -> bool:
    """Whether a run's result is there, and not of a run before the checkpoint's: one begun anew and then killed."""
    written = lambda path: Path(path).stat().st_mtime_ns
    return result.is_file() and not (checkpoint and written(checkpoint) > written(result))


def check_resume_compatible(
    saved: dict[str, Any], now: dict[str, Any], of: str, free: tuple[str, ...] = (), what: str = "the checkpoint"
) -> None:
    """That a checkpoint is not gone on with as another run: half of each would be a model of no recipe at all.

    Args:
        saved: Settings of the run that wrote it.
        now: Those of this run.
        of: Where they are set: model or data.
        free: Those that change no result, or nothing that comes after a checkpoint.
        what: What the other run wrote, for the error.

    Raises:
        UserError: One of them differs.
    """
    for key in sorted(key for key in now.keys() - set(free) if not key.startswith("_")):
        if _plain(saved.get(key)) != _plain(now[key]):
            raise UserError(
                f"{what} is of a run with {of}.{key}={saved.get(key)!r}, this one has {now[key]!r}; go on with "
                "what it was started with, or start anew with another --out"
            )


def _plain(setting: Any) -> str:
    """The same for a tuple and a list, and for a folder that is spelled otherwise."""
    if isinstance(setting, str) and Path(setting).exists():
        setting = str(Path(setting).resolve())
    return json.dumps(setting, sort_keys=True, default=str)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints, written beside their name and then renamed.

    Lightning's own writes to memory, then to /tmp, and moves that across file systems.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        Raises:
            UserError: It is ZeRO's, which this strategy cannot read.
        """
        if Path(path).is_dir():
            raise UserError(
                f"checkpoint {path} is a directory, from a run with ZeRO; add its configs/cluster/zero*.yaml"
            )
        return super().load_checkpoint(path, *args, **kwargs | {"weights_only": True})


def finish_directory(path: Path, facts: dict[str, Any]) -> None:
    """Lists the files of `path`.partial in its whole.json, beside `facts`, and renames it to `path`."""
    partial = partial_path(path)
    sizes = {
        str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()
    }
    (partial / LISTING).write_text(json.dumps({**facts, "bytes": sizes}, indent=1) + "\n")
    commit_directory(path)


def read_listing(path: Path) -> dict[str, Any]:
    """whole.json of a ZeRO checkpoint.

    Raises:
        UserError: There is none, or a file it lists is missing or has another size.
    """
    problem = find_defect(path)
    if problem:
        raise UserError(f"checkpoint {path}: {problem}; take an earlier one, or `last` for the newest whole one")
    return json.loads((path / LISTING).read_text())


def find_defect(path: Path) -> str | None:
    """Why `path` is no whole checkpoint; None if it is one. Sizes and archive indices are read, not the tensors."""
    if path.is_file():
        return find_unsafe_globals(path) if zipfile.is_zipfile(path) else "the file is cut short or no checkpoint"
    if not path.is_dir():
        return "no such file or directory"
    if (path / "latest_universal").is_file():
        return find_unsafe_globals(path)  # what DeepSpeed's ds_to_universal writes last
    try:
        sizes = json.loads((path / LISTING).read_text())["bytes"]
    except (OSError, ValueError, KeyError):
        return f"no readable {LISTING}, which is written last"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or not of {size} bytes"
    return find_unsafe_globals(path)


def find_unsafe_globals(path: Path) -> str | None:
    """What a checkpoint would execute if it was loaded, None if nothing; looked up in its pickles, not tried."""
    files = [path] if path.is_file() else sorted(path.rglob("*.pt"))
    try:
        for file in files:
            with error_context(f"{file} is damaged"):
                allowed = (*DEEPSPEED, *(GETATTR if _getattr_of_stages_only(file) else ())) if path.is_dir() else ()
            check_pickle(file, allowed)
    except ValueError as error:
        return str(error)
    return None


def _getattr_of_stages_only(file: Path) -> bool:
    """Whether what is pickled in a file of torch.save calls getattr for members of ZeroStageEnum and for nothing else:
    so Python 3.11 writes them, and later ones otherwise. With any other name getattr leads to whatever there is."""
    with zipfile.ZipFile(file) as archive:
        pickled = next((archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")), b"")
    steps, memo = [], {}
    for code, argument, _ in pickletools.genops(pickled):
        if "PUT" in code.name:
            memo[argument] = steps[-1]
        else:
            steps.append(memo[argument] if "GET" in code.name else (code.name, argument))
    looked_up = [steps[i + 1 : i + 5] for i, step in enumerate(steps) if step in GETATTR_STEPS]
    stage = ("GLOBAL", STAGES.replace(".ZeroStageEnum", " ZeroStageEnum"))
    expected = [[stage, ("BINUNICODE", name), ("TUPLE2", None), ("REDUCE", None)] for name in STAGE_NAMES]
    protocol_2 = not any(name in ("STACK_GLOBAL", "MEMOIZE") for name, _ in steps)
    return protocol_2 and all(use in expected for use in looked_up)


def verify_checksums(path: Path) -> str | None:
    """What in a whole checkpoint is not as it was written, None if all is. Everything is read, at some GB a second and
    core, against the sums that torch.save writes and torch.load does not look at: it loads a flipped bit."""
    files = [path] if path.is_file() else sorted(path.rglob("*.pt"))
    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(_verify_file, files)), None)


def _verify_file(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, ValueError, EOFError) as error:
        return f"{path.name} is damaged: {error}"  # where it says what it holds
    return entry and f"{path.name} is damaged: {entry} is not as it was written"


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none; says which newer ones it passes over."""
    found = [p for p in folder.glob("*") if p.name.removesuffix(REPLACED).endswith(".ckpt")]
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        problem = find_defect(path) or verify_checksums(path)
        if problem is None:
            return path
        log.warning("passing over checkpoint %s: %s", path, problem)
    return None


def resolve_ckpt_path(path: str | None, folder: Path) -> str | None:
    """The checkpoint that `--ckpt_path` names: `last` is the newest whole one in `folder`, None where there is none.

    Raises:
        UserError: The one that is named is not whole; it is not replaced by another without asking.
    """
    if path == "last":
        found = latest_valid_checkpoint(folder)
        log.info("resuming %s", found) if found else log.info("no checkpoint in %s yet; starting anew", folder)
        return str(found) if found else None
    if path is not None:
        problem = find_defect(Path(path)) or verify_checksums(Path(path))
        if problem:
            raise UserError(
                f"checkpoint {path}: {problem}. The newest whole one in {folder}: {latest_valid_checkpoint(folder)}"
            )
    return path
