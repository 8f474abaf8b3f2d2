"""Monitor of the loss: stops training when it is not finite."""

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from llava_bidir.common.errors import UserError


class LossMonitor(Callback):
    """End the run on all ranks, before gradients reach the weights, if a loss is NaN or infinite."""

    def __init__(self):
        self.window: list[tuple[Tensor, list[str]]] = []  # losses and records of a step

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch,
        batch_idx: int,
    ) -> None:
        """Keep the names of the records for `on_before_backward`."""
        self.ids = batch["ids"]

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss with its records, without a device synchronisation."""
        self.window.append((loss.detach(), self.ids))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer
    ) -> None:
        """Stop on a loss that is not finite. The host waits for the device here only, once per step."""
        finite = torch.stack([loss for loss, _ in self.window]).isfinite().tolist()
        if not trainer.strategy.reduce_boolean_decision(all(finite), all=True):
            bad = [
                ids
                for is_finite, (_, ids) in zip(finite, self.window, strict=True)
                if not is_finite
            ]
            samples = f"samples {', '.join(bad[0])}" if bad else "samples of another rank"
            raise UserError(f"the loss is not finite at step {trainer.global_step}: {samples}")
        self.window.clear()
