"""A callback for jobs: the last rank is slow, and the first one records every loss."""

import os
import time
from pathlib import Path

from lightning import Callback


class Skew(Callback):
    """Record the losses of the first rank, and delay the last one.

    Args:
        losses: File with a line "restarts step loss" for each micro-batch of rank 0.
        seconds: Delay of the last rank per micro-batch.
    """

    def __init__(self, losses: str, seconds: float):
        self.losses = losses
        self.seconds = seconds

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_rank == trainer.world_size - 1:
            time.sleep(self.seconds)

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        if trainer.is_global_zero:
            with Path(self.losses).open("a") as file:
                restarts = os.environ.get("SLURM_RESTART_COUNT", 0)
                file.write(f"{restarts} {trainer.global_step} {outputs['loss'].item():.9f}\n")
