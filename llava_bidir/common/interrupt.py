"""Ctrl-C in a run: a checkpoint is saved after the present step, and what is saved is said as it is."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lightning import Callback, LightningModule, Trainer

from .step_boundary import at_step_boundary, save_interrupted

log = logging.getLogger(__name__)


class SaveOnInterrupt(Callback):
    """After Ctrl-C, save RUN/checkpoints/last.ckpt at the end of the step, and end; a second Ctrl-C ends at once.

    This holds for one process. Several cannot agree on a step unless they talk to each other after each one, as they do
    on Slurm (training/slurm_requeue.py).

    Raises:
        KeyboardInterrupt: After the step.
    """

    def __init__(self):
        self.asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C."""
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
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
        """Save and end if asked to."""
        if self.asked and at_step_boundary(trainer):
            save_interrupted(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back."""
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
