"""The folder and the process of a run: a command that is repeated never replaces its results unasked.

An interrupted save leaves a name that ends in .partial, which never counts as a checkpoint; the previous checkpoint is
untouched. A checkpoint is a file (one process, DDP, FSDP2) or a directory (ZeRO).
"""

import json
import logging
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import UserError
from .files import REPLACED, commit_directory, partial_path, write_files
from .identity import Identity, check_same_identity

if TYPE_CHECKING:  # seconds, which a run without a training loop does not need
    from lightning import Trainer

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


CONFIG_FILE = "config.yaml"
EVENTS = "events.out.tfevents.*"
RESUME_ADVICE = "resume with the original setting, or start a new run with another --out"


@dataclass(frozen=True)
class RunPlan:
    """What `fit` does with a run's folder.

    Args:
        identity: Identity of this run.
        checkpoint: Checkpoint to resume, or None.
        finished: The folder holds the finished run of this identity.
        replaced: Files to delete once training starts.
    """

    identity: Identity
    checkpoint: str | None = None
    finished: bool = False
    replaced: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and what a run of its kind leaves in it.

    Args:
        path: The folder.
        checkpoints: Folder of the run's checkpoints.
        result: The file that marks the run as finished.
        results: Names of all that a run writes, besides config, events and checkpoints.
        read_identity: Returns the identity stored with `result`.
    """

    path: Path
    checkpoints: Path
    result: Path
    results: Sequence[str]
    read_identity: Callable[[], Identity | None]


def plan_run(
    folder: RunFolder,
    identity: Identity,
    ckpt_path: str | None,
    overwrite: bool,
    advice_of: Mapping[str, str] | None = None,
) -> RunPlan:
    """Return whether to start, resume or replace the run in a folder; one process decides for all.

    Args:
        folder: The folder of the run.
        identity: Of this run.
        ckpt_path: "last", a path, or None to start a new run.
        overwrite: Replace the run that the folder holds.
        advice_of: What to do where a setting differs from the finished run's, by setting.

    Raises:
        UserError: The folder holds a run and neither `ckpt_path` nor `overwrite` says what to do with it, its identity
            is another one, or there is no such checkpoint.
    """
    checkpoints = folder.checkpoints
    if overwrite and ckpt_path is not None:
        raise UserError(
            "--ckpt_path resumes a run and --overwrite true replaces it; give one of them"
        )
    if overwrite:
        return RunPlan(identity, replaced=_files_of_run(folder))
    checkpoint = resolve_ckpt_path(ckpt_path, checkpoints)
    if is_complete(checkpoint if ckpt_path == "last" else None, folder.result):
        if ckpt_path != "last":
            name = folder.result.relative_to(folder.path)
            raise _occupied(folder.path, f"a finished run ({name})")
        saved = folder.read_identity()
        check_same_identity(saved, identity, str(folder.result), RESUME_ADVICE, advice_of)
        return RunPlan(identity, finished=True)
    if ckpt_path is None and (left := sorted(checkpoints.glob("*.*"))):
        raise _occupied(folder.path, f"checkpoints of an unfinished run, e.g. {left[-1].name}")
    if ckpt_path == "last" and not any(checkpoints.glob("*.*")):
        log.info("no checkpoint in %s yet; starting a new run", checkpoints)
    return RunPlan(identity, checkpoint)


def begin_run(folder: Path, config: str, replaced: Sequence[Path]) -> None:
    """Write config.yaml and delete what the run replaces, once all settings were accepted; on one process.

    A link is replaced, not written through: its file is not the run's.
    """
    write_files({folder / CONFIG_FILE: config})
    for path in replaced:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _occupied(folder: Path, content: str) -> UserError:
    return UserError(
        f"{folder} holds {content}; add `--ckpt_path last` to resume it or `--overwrite true` to replace it, or "
        "choose another --out"
    )


def _files_of_run(folder: RunFolder) -> list[Path]:
    """Return the results, checkpoints and events in a run's folder."""
    results = [folder.path / name for name in folder.results]
    events = folder.path.glob(EVENTS)
    return [*folder.checkpoints.glob("*"), *filter(Path.exists, results), *events]


@contextmanager
def run_process(matmul_precision: str = "highest") -> Iterator[None]:
    """Log plain lines, and end the group of processes with the command.

    Args:
        matmul_precision: Of float32 products: "highest", or "high" for TF32 on GPUs. What it was before comes back, so
            that no command of a process changes what the next one computes.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        # Lightning destroys NCCL groups only; a process that exits with running gloo threads may abort
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()


@contextmanager
def interrupt_says_what_is_saved(checkpoints: Path) -> Iterator[None]:
    """Name the checkpoint to go on from, or that there is none, when Ctrl-C ends the block.

    Args:
        checkpoints: Folder of the run's checkpoints.

    Raises:
        KeyboardInterrupt: With that sentence, which `one_line_errors` shows.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        by_lightning = isinstance(stop, SystemExit) and isinstance(
            stop.__context__, KeyboardInterrupt
        )
        if isinstance(stop, SystemExit) and not by_lightning:
            raise
        saved = sorted(checkpoints.glob("*.*"), key=lambda path: path.stat().st_mtime_ns)
        complete = [path for path in saved if not path.name.endswith(".partial")]
        if not complete:
            raise KeyboardInterrupt("nothing was saved yet: the same command starts anew") from None
        raise KeyboardInterrupt(
            f"run the same command again with `--ckpt_path last` to go on from {complete[-1]}"
        ) from None


WARNINGS = (
    "LightningCLI's args parameter",
    ".*does not have many workers",
    ".*isinstance.treespec",
    ".*in eval mode",  # the frozen model
    ".*your dataloader is not resumable",  # the data modules restore their position themselves
    "Total length of `list` across ranks is zero",  # no validation questions
    "The `srun` command is available",  # a run on a cluster's login node or inside an allocation
)
LOGGED = {  # by logger: beginnings of messages
    "lightning.pytorch.utilities.rank_zero": (
        "💡 Tip",
        "TPU available",
        "IPU available",
        "HPU available",
    ),
    "transformers.modeling_utils": (
        "The new embeddings will be",
        "The new lm_head weights will be",
    ),
}


class _NoExpectedMessages(logging.Filter):
    """Leave out what a logger says with some beginnings."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(LOGGED[self.name])


FILTERS = [_NoExpectedMessages(name) for name in LOGGED]  # a logger takes each once


def hide_expected_messages() -> None:
    """Leave out the messages above. Others stay: they may be about the user's settings."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for expected in FILTERS:
        logging.getLogger(expected.name).addFilter(expected)
    # a line for each table of each font of a PDF
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # else DeepSpeed warns on stdout that it has to guess
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def batches_per_epoch(batches: int, trainer: "Trainer") -> int:
    """Return how many of its batches a rank trains in an epoch: at most `trainer.limit_train_batches`, at least one."""
    limit = trainer.limit_train_batches  # a number, or a share
    return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))


def optimizer_steps(trainer: "Trainer") -> int:
    """Return the number of optimizer steps of the complete training, from its config.

    `trainer.estimated_stepping_batches` would start the data loader before the checkpoint's position is restored.

    Raises:
        UserError: It has no end.
    """
    # negative: no limit
    limits = trainer.datamodule.steps_per_epoch * trainer.max_epochs, trainer.max_steps
    if max(limits) < 0:
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return min(limit for limit in limits if limit >= 0)
