"""Progress of training as plain lines, for logs: a bar would write one line with thousands of carriage returns."""

import logging
import math
import time
from datetime import timedelta

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two lines within an epoch


class LogProgress(Callback):
    """Log step, loss, rate and the time left, every ten seconds and at the end of each epoch."""

    def __init__(self):
        self.started = 0.0
        self.last = 0.0
        self.first_batch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a resumed run has batches behind it."""
        self.started = self.last = time.monotonic()
        self.first_batch = trainer.fit_loop.epoch_loop.total_batch_idx

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Log if the last line is some seconds old or the epoch ends."""
        now = time.monotonic()
        done = trainer.fit_loop.epoch_loop.total_batch_idx - self.first_batch
        left = batches_left(trainer, batch_idx)
        batches = trainer.num_training_batches
        epochs = trainer.max_epochs or 0
        steps = trainer.max_steps
        # else epochs may be short
        ends = trainer.global_step == steps or (epochs > 0 and batch_idx + 1 == batches)
        if not trainer.is_global_zero or (now - self.last < SECONDS and not ends):
            return
        self.last = now
        rate = done / max(now - self.started, 1e-9)
        text = f"epoch {trainer.current_epoch + 1}{f'/{epochs}' if epochs > 0 else ''}"
        if steps > 0 or trainer.accumulate_grad_batches > 1:  # else batches are steps
            total = total_steps(trainer)
            text = f"step {trainer.global_step}{f' of {total}' if total else ''}, {text}"
        of_batch = outputs["loss"] * trainer.accumulate_grad_batches  # Lightning divides by it
        loss = float(trainer.callback_metrics.get("train/loss", of_batch))  # of the step
        text += f", batch {batch_idx + 1}/{batches}, loss {loss:.4g}, {rate:.3g} batches/s"
        if rate and left is not None:
            text += f", {timedelta(seconds=round(left / rate))} left"
        log.info(text)


def logs_progress(trainer: Trainer) -> bool:
    """Return whether progress is logged as lines."""
    return any(isinstance(callback, LogProgress) for callback in trainer.callbacks)


def total_steps(trainer: Trainer) -> int | None:
    """Return the number of optimizer steps of the complete run, None if nothing limits it."""
    by_epochs = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * (
        trainer.max_epochs or 0
    )
    limits = [limit for limit in (trainer.max_steps, by_epochs) if limit > 0]
    return min(limits) if limits else None


def batches_left(trainer: Trainer, batch_idx: int) -> int | None:
    """Return the number of batches after this one, None if nothing limits the run.

    A step of several batches may have some of them behind it.
    """
    batches = trainer.num_training_batches
    accumulated = trainer.accumulate_grad_batches
    epochs = trainer.max_epochs or 0
    steps = trainer.max_steps
    left = []  # until each limit
    if steps > 0:
        begun = 0 if batch_idx + 1 == batches else (batch_idx + 1) % accumulated
        left.append((steps - trainer.global_step) * accumulated - begun)
    if epochs > 0:
        left.append((epochs - trainer.current_epoch) * batches - batch_idx - 1)
    return min(left) if left else None
