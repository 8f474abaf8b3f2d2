"""Save the checkpoint of a training: RUN/checkpoints/last.ckpt, from which the run is resumed exactly."""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.environments import SLURMEnvironment

from .cli import Count
from .errors import UserError, error_context
from .files import atomic_write
from .processes import rank_zero_info
from .runs import LAST

log = logging.getLogger(__name__)

INTERRUPTED = os.EX_TEMPFAIL  # exit status of an unfinished run; the job script stops on it


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints of one file, written beside their place and then renamed, and loaded without executing code.

    Lightning's own plugin writes to memory, then to /tmp, and moves the file across file systems (its issue 21253).
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`."""
        with atomic_write(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str, *args: Any, mmap: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`.

        Args:
            path: Its file.
            *args, **kwargs: Lightning's, which change nothing.
            mmap: Read a tensor only when it is used.

        Raises:
            UserError: The file cannot be loaded as plain data, or is a folder, from a run with ZeRO.
        """
        with error_context(f"checkpoint {path}"):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


class Checkpoints(Checkpoint):
    """Save RUN/checkpoints/last.ckpt every some steps and after each epoch; on a signal, save it and end the run.

    The signals are Ctrl-C, of which a second one ends the run at once; SIGTERM, by which a container is stopped, a spot
    machine taken back, and a job of Slurm preempted or cancelled; and on Slurm SIGUSR1, which comes some minutes before
    the time limit (`--signal` in slurm/stage.sbatch) and requeues the job. Slurm itself requeues a preempted job, and a
    cancelled one must not return.

    A handler only notes its signal, since a checkpoint needs all ranks, each of which may be at another point of the
    step. After a step the ranks agree on what to do. (Lightning's handlers save or broadcast at once, and hang if ranks
    are skewed: its issue 21406.)

    Args:
        every_n_steps: Optimizer steps between two checkpoints; the most that a failed node can lose.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
        SystemExit: After another signal, with status INTERRUPTED, on all ranks after the same step.
    """

    def __init__(self, every_n_steps: Count = 500):
        self.every_n_steps = every_n_steps
        self.on_slurm = SLURMEnvironment.detect()
        self.received: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ignore SIGUSR1 outside of training, when there is nothing to save: Lightning restores this handler."""
        if self.on_slurm and _is_main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def on_train_start(self, *args: Any) -> None:
        """Note signals from now on; Lightning restores all handlers after the training."""
        self.received.clear()
        if not _is_main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        if self.on_slurm:
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.add(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning(
                "Ctrl-C: the run ends with a checkpoint after this step; Ctrl-C again ends it at once"
            )

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save if it is due, or if a rank has received a signal, and then end the run.

        Not within a step, since a checkpoint has no accumulated gradients; nor after the last batch of an epoch, whose
        validation would be skipped: :meth:`on_train_epoch_end` saves after it.
        """
        loop = trainer.fit_loop.epoch_loop
        # private names as of Lightning 2.6, to which pyproject.toml keeps
        if loop._should_accumulate() or loop._is_training_done:
            return
        ends = trainer.strategy.reduce_boolean_decision(bool(self.received), all=False)
        if ends:
            trainer._logger_connector.update_train_step_metrics()  # Lightning logs after its callbacks
        if ends or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if ends:
            self._end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
        """Save after the epoch and its validation, and after the final step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / LAST)

    def _end(self, trainer: Trainer) -> None:
        agree = trainer.strategy.reduce_boolean_decision
        if agree(signal.SIGINT in self.received, all=False):
            raise KeyboardInterrupt
        rank_zero_info(
            f"interrupted after step {trainer.global_step}; resume with `--ckpt_path last`"
        )
        if agree(signal.SIGUSR1 in self.received, all=False):
            if trainer.is_global_zero:
                _requeue()
            trainer.strategy.barrier()  # srun kills all ranks when one exits
        raise SystemExit(INTERRUPTED)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Raise if the checkpoint, also of a ModelCheckpoint, lacks gradients that were accumulated."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if progress["current"]["processed"] % trainer.accumulate_grad_batches:
            raise UserError(
                "the checkpoint was saved within a step, whose gradients it lacks; resume another one"
            )


def _is_main_thread() -> bool:
    """Return whether this thread may set handlers of signals."""
    return threading.current_thread() is threading.main_thread()


def _requeue() -> None:
    """Ask Slurm to run this job again, or this task of a job array, as Lightning does in `_slurm_sigusr_handler_fn`."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"  # the last task's own id is that of the whole array
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:  # e.g. in a container
        log.warning("job %s is not requeued (%s): submit it again to resume it", job, error)
