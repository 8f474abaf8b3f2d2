"""Monitor of the loss: stops training when it is not finite."""

import math
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from llava_bidir.common.errors import UserError


class LossMonitor(Callback):
    """Check each loss before its gradients reach the weights.

    A NaN or infinite loss ends the run on all ranks. RUN/nonfinite/ then has the state that reproduces it: weights and
    optimizer before the step (before.ckpt), and each rank's micro-batches with their losses (rank*.pt).
    """

    def __init__(self):
        self.window: list[tuple[Tensor, dict]] = []

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch,
        batch_idx: int,
    ) -> None:
        """Keep the batch for `on_before_backward`."""
        self.batch = batch

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss with its batch, without a device synchronisation."""
        loss = loss.detach() * trainer.accumulate_grad_batches  # Lightning divides by it
        self.window.append((loss, self.batch))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer
    ) -> None:
        """Stop on a loss that is not finite. The host waits for the device here only, once per step."""
        finite = bool(torch.stack([loss for loss, _ in self.window]).isfinite().all())
        if not trainer.strategy.reduce_boolean_decision(finite, all=True):
            self._stop(trainer)
        self.window.clear()

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
