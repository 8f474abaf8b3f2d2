"""Save the checkpoints of a training: where it can be resumed exactly, and after a signal."""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from .errors import UserError, error_context
from .files import atomic_write
from .runs import LAST

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints, written under a temporary name in their folder and then renamed.

    Lightning's own plugin writes to memory, then to /tmp, and moves the file across file systems.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`."""
        with atomic_write(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str,
        *args: Any,
        mmap: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`; pickled code is rejected, not executed.

        Args:
            path: Its file.
            *args, **kwargs: Lightning's, which change nothing.
            mmap: Read a tensor only when it is used.

        Raises:
            UserError: The file cannot be loaded as plain data, or is a checkpoint of a run with ZeRO.
        """
        if Path(path).is_dir():
            raise UserError(
                f"checkpoint {path} is a directory, from a run with ZeRO; add the run's configs/cluster/zero*.yaml"
            )
        with error_context(f"checkpoint {path}"):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


WITHIN_STEP = "within_step"  # key of checkpoints
INTERRUPTED = os.EX_TEMPFAIL  # exit status of an unfinished run; the job script stops on it


def at_step_boundary(trainer: Trainer) -> bool:
    """Return whether a checkpoint after this batch can be resumed exactly.

    It cannot within an optimizer step, because checkpoints hold no accumulated gradients. Nor can it after the last
    batch of an epoch, because Lightning would skip the validation of that epoch. The end of an epoch has a checkpoint
    of its own.
    """
    epoch = trainer.fit_loop.epoch_loop
    return not (epoch._should_accumulate() or epoch._is_training_done)


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the callbacks that save during training; other kinds of Checkpoint have none of their attributes."""
    return [x for x in trainer.checkpoint_callbacks if isinstance(x, ModelCheckpoint)]


class SaveAtStepBoundary(Callback):
    """Make every ModelCheckpoint that saves every n steps or minutes, or after a validation, wait for a step boundary.

    Without it, such a ModelCheckpoint also saves at the first micro-batch after a resume, where the number of steps is
    still that of the checkpoint. The final step has a checkpoint, too, also where no validation follows it.
    """

    def __init__(self):
        self.last_times: dict[ModelCheckpoint, float] = {}  # of those that wait for a boundary
        self.saved_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let ModelCheckpoint remove the checkpoint that the run was resumed from when it has saved a newer one."""
        trainer.ckpt_path = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Mark the current step as saved if it is not a boundary, and stop the clock of `train_time_interval`.

        Lightning starts the next interval where a save is due, also where it then skips the save.
        """
        for callback, last_time in self.last_times.items():
            callback._last_time_checked = last_time
        self.last_times.clear()
        if at_step_boundary(trainer):
            return
        for callback in model_checkpoints(trainer):
            if not callback._every_n_epochs:  # the others save after a validation or an epoch
                callback._last_global_step_saved = trainer.global_step
            if callback._last_time_checked is not None:
                self.last_times[callback] = callback._last_time_checked
                callback._last_time_checked = None  # no save is due

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the current step as saved after a validation within it (`trainer.val_check_interval`)."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            for callback in model_checkpoints(trainer):
                callback._last_global_step_saved = trainer.global_step

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Note the step, and in the checkpoint of an exception whether it is within a step."""
        self.saved_step = trainer.global_step
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        is_complete = batches % trainer.accumulate_grad_batches == 0
        checkpoint[WITHIN_STEP] = not is_complete and batches < trainer.num_training_batches

    def on_load_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Raise if the checkpoint lacks gradients that were accumulated."""
        if checkpoint.get(WITHIN_STEP):
            raise UserError(
                "the checkpoint was saved within a step, whose gradients it lacks; resume another one"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save RUN/checkpoints/last.ckpt if the final step has no checkpoint, before the model is exported."""
        folder = _checkpoints(trainer)
        folders = {
            Path(callback.dirpath or folder).resolve() for callback in model_checkpoints(trainer)
        }
        is_saved = self.saved_step == trainer.global_step and folders <= {folder.resolve()}
        if not trainer.checkpoint_callbacks or is_saved:
            return
        last = folder / LAST
        trainer.save_checkpoint(last)
        for callback in model_checkpoints(trainer):
            callback._last_checkpoint_saved = str(last)  # else one with save_last saves it again


class SaveOnSignal(Callback):
    """After a signal, save RUN/checkpoints/last.ckpt at the next step boundary, and end the run.

    Ctrl-C (SIGINT), in a run of one process. A second one ends it at once. Several processes cannot agree on a step
    unless they talk to each other after each one, as they do on Slurm.

    On Slurm, SIGUSR1, which comes some minutes before the time limit (`--signal` in slurm/stage.sbatch) and requeues
    the job, and SIGTERM, which comes on preemption or `scancel` and does not: Slurm itself requeues a preempted job,
    and a cancelled job must not return. A handler only notes its signal, because a checkpoint needs all ranks and each
    may be at another point of the step; after a step the ranks agree on what to do. (Lightning's handlers save or
    broadcast immediately, and the run hangs if ranks are skewed: Lightning issue 21406.)

    Args:
        on_slurm: Whether the run is a job of Slurm that is to be requeued.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: After a signal of Slurm, with status INTERRUPTED, on all ranks after the same step.
    """

    def __init__(self, on_slurm: bool = False):
        self.on_slurm = on_slurm
        self.received: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ignore SIGUSR1 outside training, when there is nothing to save.

        Lightning restores this handler after training, so a late signal does not kill a run that is finished.
        """
        if self.on_slurm:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note signals from now on; a ModelCheckpoint that keeps a last.ckpt replaces the one that is there."""
        last = _checkpoints(trainer) / LAST
        for callback in model_checkpoints(trainer):
            if callback.save_last and last.exists() and last.parent == Path(callback.dirpath):
                callback.last_model_path = str(last)  # else Lightning writes last-v1.ckpt beside it
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)
        if self.on_slurm:
            signal.signal(signal.SIGUSR1, self._note)
            signal.signal(signal.SIGTERM, self._note)  # replaces Lightning's handler

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning(
                "Ctrl-C: the run ends with a checkpoint after this step; Ctrl-C again ends it at once"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Save and end the run if this process, on Slurm any rank, received a signal."""
        if not at_step_boundary(trainer):
            return
        agree = trainer.strategy.reduce_boolean_decision
        stops = bool(self.received)
        if self.on_slurm:
            stops = agree(stops, all=False)
        if not stops:
            return
        trainer._logger_connector.update_train_step_metrics()  # Lightning logs after its callbacks
        trainer.save_checkpoint(_checkpoints(trainer) / LAST)
        if signal.SIGINT in self.received:
            raise KeyboardInterrupt
        rank_zero_info(
            f"interrupted after step {trainer.global_step}; resume with `--ckpt_path last`"
        )
        if agree(signal.SIGUSR1 in self.received, all=False):
            if trainer.is_global_zero:
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
            trainer.strategy.barrier()  # srun kills all ranks when one exits
        raise SystemExit(INTERRUPTED)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back if it was taken."""
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _checkpoints(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "checkpoints"
