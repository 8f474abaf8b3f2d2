"""The folder and the process of a run: a command that is repeated never replaces its results unasked."""

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import UserError
from .files import REPLACED, read_json, write_files
from .identity import Identity, check_same_identity
from .progress import PROGRESS

if TYPE_CHECKING:  # seconds, which a run without a training loop does not need
    from lightning import Trainer

log = logging.getLogger(__name__)

LAST = "last.ckpt"  # in RUN/checkpoints; a file, or under ZeRO a folder
RESUME_ADVICE = "resume with the original setting, or start a new run with another --out"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, and what a run of its kind leaves in it.

    Args:
        path: The folder.
        result: The file that marks the run as finished.
        results: Names of all that a run writes, besides config, events and checkpoints.
        made_from: The JSON file that has the run's identity.
    """

    path: Path
    result: Path
    results: Sequence[str]
    made_from: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def check_finished(self, identity: Identity) -> None:
        """Raise a UserError if the finished run was made from something else; see `check_same_identity`."""
        saved = read_json(self.made_from).get("identity")
        check_same_identity(saved, current=identity, source=str(self.result), advice=RESUME_ADVICE)


@dataclass(frozen=True)
class RunPlan:
    """What a command does with the folder of its run.

    Args:
        checkpoint: Checkpoint to resume, or None.
        finished: The folder holds a finished run.
        replaced: Files to delete once the run begins.
    """

    checkpoint: Path | None = None
    finished: bool = False
    replaced: Sequence[Path] = ()


def plan_run(folder: RunFolder, ckpt_path: str | None, overwrite: bool) -> RunPlan:
    """Return whether to start, resume or replace the run in a folder, by files alone, which all processes see.

    Args:
        folder: The folder of the run.
        ckpt_path: "last", a path, or None to start a new run.
        overwrite: Replace the run that the folder holds.

    Raises:
        UserError: The folder holds a run and neither `ckpt_path` nor `overwrite` says what to do with it, or there is
            no such checkpoint.
    """
    if overwrite and ckpt_path is not None:
        raise UserError(
            "--ckpt_path resumes a run and --overwrite true replaces it; give one of them"
        )
    if overwrite:
        results = [folder.path / name for name in (*folder.results, PROGRESS)]
        events = folder.path.glob("events.out.tfevents.*")
        return RunPlan(
            replaced=[*folder.checkpoints.glob("*"), *filter(Path.exists, results), *events]
        )
    is_finished = folder.result.is_file()
    kind = "an unfinished"
    left = sorted(folder.checkpoints.glob("*.*"))
    if is_finished:
        kind = "a finished"
        left = [folder.result]
    if left and ckpt_path is None or is_finished and ckpt_path != "last":
        raise UserError(
            f"{folder.path} holds {kind} run ({left[-1].relative_to(folder.path)}); add `--ckpt_path last` to resume "
            "it or `--overwrite true` to replace it, or choose another --out"
        )
    if is_finished:
        return RunPlan(finished=True)
    return RunPlan(ckpt_path and find_checkpoint(ckpt_path, folder.checkpoints))


def find_checkpoint(ckpt_path: str, checkpoints: Path) -> Path | None:
    """Return the checkpoint for `--ckpt_path`: `last` is that of the run, None if it has none yet.

    Raises:
        UserError: There is no such file or folder.
    """
    if ckpt_path != "last":
        if not Path(ckpt_path).exists():
            raise UserError(f"there is no checkpoint {ckpt_path}")
        return Path(ckpt_path)
    last = last_checkpoint(checkpoints)
    if last is None:
        log.info(f"no checkpoint in {checkpoints} yet")
    else:
        log.info(f"the checkpoint is {last}")
    return last


def last_checkpoint(checkpoints: Path) -> Path | None:
    """Return the last checkpoint in the folder of a run's checkpoints, None if there is none.

    A kill between the two renames of a folder leaves the one before.
    """
    names = (LAST, LAST + REPLACED)
    return next((checkpoints / name for name in names if (checkpoints / name).exists()), None)


def begin_run(folder: Path, config: str, replaced: Sequence[Path]) -> None:
    """Write config.yaml and delete what the run replaces, once all settings were accepted; on one process."""
    write_files({folder / "config.yaml": config})
    for path in replaced:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- the process
@contextmanager
def run_process(matmul_precision: str = "highest") -> Iterator[None]:
    """Log plain lines, and end the group of processes with the command.

    Args:
        matmul_precision: Of float32 products: "highest", or "high" for TF32 on GPUs. What it was before comes back, so
            that no command of a process changes what the next one computes.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # a line for each table of each font of a PDF
    logging.getLogger("fontTools").setLevel(logging.WARNING)
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
def interrupt_says_how_to_resume() -> Iterator[None]:
    """Say how to go on when Ctrl-C ends the block.

    Raises:
        KeyboardInterrupt: With that sentence, which `one_line_errors` shows.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning exits on Ctrl-C
        if KeyboardInterrupt not in (type(stop), type(stop.__context__)):
            raise
        advice = "run the same command again with `--ckpt_path last` to go on"
        raise KeyboardInterrupt(advice) from None


# ---------------------------------------------------------------------------------------------------- its length
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
