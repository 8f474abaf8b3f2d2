"""A callback for jobs: the last rank is slow or all pause, and the first one records every loss."""

import os
import time
from pathlib import Path

from lightning import Callback


class Skew(Callback):
    """Record the losses of the first rank, and delay the last one or pause until the job is requeued.

    Args:
        losses: File with a line "restarts step loss" for each micro-batch of rank 0.
        seconds: Delay of the last rank per micro-batch.
        pause_after: Step at which a job that was not requeued yet waits for it.
    """

    def __init__(self, losses: str, seconds: float = 0, pause_after: int | None = None):
        self.losses = losses
        self.seconds = seconds
        self.pause_after = pause_after

    def on_train_batch_start(
        self,
        trainer,
        pl_module,
        batch,
        batch_idx,
    ):
        while trainer.global_step == self.pause_after and "SLURM_RESTART_COUNT" not in os.environ:
            time.sleep(0.1)
        if trainer.global_rank == trainer.world_size - 1:
            time.sleep(self.seconds)

    def on_train_batch_end(
        self,
        trainer,
        pl_module,
        outputs,
        batch,
        batch_idx,
    ):
        if trainer.is_global_zero:
            with Path(self.losses).open("a") as file:
                restarts = os.environ.get("SLURM_RESTART_COUNT", 0)
                file.write(f"{restarts} {trainer.global_step} {outputs['loss'].item():.9f}\n")
