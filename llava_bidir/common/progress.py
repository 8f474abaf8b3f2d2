"""Progress of training as plain lines, for logs: a bar would write one line with thousands of carriage returns."""

import logging
import time

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
        ends = batch_idx + 1 == batches if epochs > 0 else trainer.global_step == steps  # epochs can be very short
        if not trainer.is_global_zero or (now - self.last < SECONDS and not ends):
            return
        self.last, done = now, trainer.fit_loop.epoch_loop.total_batch_idx - self.first_batch
        rate = done / max(now - self.started, 1e-9)
        text = f"epoch {trainer.current_epoch + 1}{f'/{epochs}' if epochs > 0 else ''}"
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning divides by it
        text += f", batch {batch_idx + 1}/{batches}, loss {loss:.4g}, {rate:.3g} batches/s"
        if epochs <= 0 and steps > 0:
            text += f", step {trainer.global_step}/{steps}"
            left = (steps - trainer.global_step) * trainer.accumulate_grad_batches
        else:
            left = (epochs - trainer.current_epoch) * batches - batch_idx - 1
        if rate and max(epochs, steps) > 0:
            text += f", {time.strftime('%H:%M:%S', time.gmtime(left / rate))} left"
        log.info(text)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a pass."""
        self.started = self.last = time.monotonic()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log if the last line is some seconds old or the pass ends."""
        now, done, batches = time.monotonic(), batch_idx + 1, trainer.num_predict_batches[0]
        if not trainer.is_global_zero or (now - self.last < SECONDS and done < batches):
            return
        self.last, rate = now, done / max(now - self.started, 1e-9)
        left = time.strftime("%H:%M:%S", time.gmtime((batches - done) / rate))
        log.info(f"batch {done}/{batches} of a pass, {rate:.3g} batches/s, {left} left")
