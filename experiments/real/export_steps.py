"""A callback that also exports a model on the way of its training."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from llava_bidir.model.build import no_zero3_partitioning
from llava_bidir.training.read_checkpoint import export_checkpoint


class ExportSteps(Callback):
    """Also export the model on the way, after some steps, to `steps/STEP/hf` in the run's folder.

    Args:
        steps: Optimizer steps, e.g. [60, 200].
    """

    def __init__(self, steps: Sequence[int]):
        self.steps = set(steps)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Export after the last micro-batch of a step, from a checkpoint as at the end of the run."""
        step = trainer.global_step
        if step not in self.steps or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        checkpoint = Path(trainer.default_root_dir) / f"steps/{step}.ckpt"
        trainer.save_checkpoint(checkpoint)
        if trainer.is_global_zero:
            with no_zero3_partitioning():
                export_checkpoint(checkpoint, checkpoint.with_suffix("") / "hf")
            if checkpoint.is_dir():
                shutil.rmtree(checkpoint)
            else:
                checkpoint.unlink()
        trainer.strategy.barrier()
