"""Monitor of the loss: stops training when it is not finite, and warns when it leaves its expected range."""

import logging
import math
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from llava_bidir.common.errors import UserError
from llava_bidir.common.step_boundary import is_logged

log = logging.getLogger(__name__)

SMOOTHING = 0.98  # of the running mean: about fifty micro-batches


class LossMonitor(Callback):
    """Check each loss before its gradients reach the weights.

    A NaN or infinite loss ends the run on all ranks. RUN/nonfinite/ then has the state that reproduces it: weights and
    optimizer before the step (before.ckpt), and each rank's micro-batches with their losses (rank*.pt).

    Args:
        expected: Range (low, high) of the smoothed loss; a loss outside it causes a warning. None disables the check.
        from_step: First optimizer step that is checked against the range.
    """

    def __init__(self, expected: tuple[float, float] | None = None, from_step: int = 0):
        self.expected, self.from_step = expected, from_step
        self.window: list[tuple[Tensor, dict]] = []
        self.mean: Tensor | None = None
        self.warned = False

    def state_dict(self) -> dict[str, float | None]:
        """Return the running mean, which a resumed run continues."""
        return {"mean": None if self.mean is None else float(self.mean)}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore the running mean."""
        self.mean = None if state["mean"] is None else torch.tensor(state["mean"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """Keep the batch for `on_before_backward`."""
        self.batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss with its batch, and update the running mean, without a device synchronisation."""
        loss = loss.detach() * trainer.accumulate_grad_batches  # Lightning divides by it
        self.window.append((loss, self.batch))
        self.mean = loss.clone() if self.mean is None else self.mean.to(loss).lerp_(loss, 1 - SMOOTHING)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer) -> None:
        """Stop on a loss that is not finite. The host waits for the device here only, once per step."""
        finite = bool(torch.stack([loss for loss, _ in self.window]).isfinite().all())
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            self._stop(trainer)
        self.window.clear()
        step = trainer.global_step
        if self.expected and step >= self.from_step and is_logged(trainer):
            self._check_range(step, float(self.mean))

    def _stop(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir) / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        window = [{"loss": float(loss), "batch": batch} for loss, batch in self.window]
        torch.save(window, folder / f"rank{trainer.global_rank}.pt")
        trainer.save_checkpoint(folder / "before.ckpt")
        bad = [item["batch"]["ids"] for item in window if not math.isfinite(item["loss"])]
        samples = f"samples {', '.join(bad[0])}" if bad else "samples of another rank"
        raise UserError(
            f"the loss is not finite at step {trainer.global_step}: {samples}. {folder} has the batches, and the "
            "weights before the step"
        )

    def _check_range(self, step: int, mean: float) -> None:
        low, high = self.expected
        outside = not low <= mean <= high
        if outside and not self.warned:
            log.warning(
                "step %d: the loss is about %.2f, expected %.2f to %.2f (loss_monitor.expected); check the data "
                "(`llava-bidir inspect`), the adapter checkpoint and the learning rate",
                *(step, mean, low, high),
            )
        self.warned = outside
