"""Progress of training as plain lines, for logs: a bar would write one line with thousands of carriage returns."""

import logging
import time
from collections.abc import Iterator, Sized
from datetime import timedelta

from lightning import Callback, LightningModule, Trainer

log = logging.getLogger(__name__)

SECONDS = 10.0  # between two lines within an epoch


class LogProgress(Callback):
    """Log step, loss, rate and the time left, every ten seconds and at the end of each epoch."""

    def __init__(self):
        self.started, self.last, self.first_batch = 0.0, 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; a resumed run has batches behind it."""
        self.started = self.last = time.monotonic()
        self.first_batch = trainer.fit_loop.epoch_loop.total_batch_idx

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Log if the last line is some seconds old or the epoch ends."""
        now, batches = time.monotonic(), trainer.num_training_batches
        epochs, steps = trainer.max_epochs or 0, trainer.max_steps
        ends = trainer.global_step == steps or (epochs > 0 and batch_idx + 1 == batches)  # else epochs may be short
        if not trainer.is_global_zero or (now - self.last < SECONDS and not ends):
            return
        self.last, done = now, trainer.fit_loop.epoch_loop.total_batch_idx - self.first_batch
        rate = done / max(now - self.started, 1e-9)
        text = f"epoch {trainer.current_epoch + 1}{f'/{epochs}' if epochs > 0 else ''}"
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning divides by it
        text += f", batch {batch_idx + 1}/{batches}, loss {loss:.4g}, {rate:.3g} batches/s"
        left = []  # batches until each limit
        if epochs <= 0 and steps > 0:
            text += f", step {trainer.global_step}/{steps}"
        if steps > 0:
            left.append((steps - trainer.global_step) * trainer.accumulate_grad_batches)
        if epochs > 0:
            left.append((epochs - trainer.current_epoch) * batches - batch_idx - 1)
        if rate and left:
            text += f", {_duration(min(left) / rate)} left"
        log.info(text)

    def track(self, batches: Sized) -> Iterator:
        """Yield batches of a pass that is no epoch of training; log as for an epoch."""
        started = last = time.monotonic()
        for done, batch in enumerate(batches, 1):
            yield batch
            now = time.monotonic()
            if now - last >= SECONDS or done == len(batches):
                last, rate = now, done / max(now - started, 1e-9)
                left = _duration((len(batches) - done) / rate)
                log.info(f"batch {done}/{len(batches)} of a pass, {rate:.3g} batches/s, {left} left")


def _duration(seconds: float) -> str:
    """Return days, hours, minutes and seconds, e.g. "1 day, 2:03:04"."""
    return str(timedelta(seconds=round(seconds)))
