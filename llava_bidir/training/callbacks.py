"""Callbacks: validation answers in the logger, and exports on the way."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning import (
    Callback,
    LightningModule,
    Trainer,
)
from torch.utils.tensorboard import SummaryWriter

from llava_bidir.data.conversation import IMAGE
from llava_bidir.model.build import no_zero3_partitioning

from .module import SHOWN
from .read_checkpoint import export_checkpoint

COLUMNS = ("image", "record", "question", "expected", "answered")
LARGEST_PX = 448  # side of an image in the event file


class ShowAnswers(Callback):
    """Log the first validation images with question, expected and given answer to TensorBoard."""

    def on_validation_start(self, *args: Any) -> None:
        """Begin a table."""
        self.rows: list[list[str]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[str],
        batch: dict[str, Any],
        *args: Any,
    ) -> None:
        """Log the samples of the batch that are among the first."""
        writer = _tensorboard(trainer)
        if writer is None:
            return
        keys = ("images", "ids", "questions", "answers")
        samples = zip(*(batch[key] for key in keys), outputs, strict=False)
        for image, *texts in [*samples][: SHOWN - len(self.rows)]:
            number = str(len(self.rows))
            texts = [" ".join(text.replace(IMAGE, "").split()) for text in texts]
            self.rows.append([number, *texts])
            if image is not None:
                image.thumbnail((LARGEST_PX, LARGEST_PX))
                name = f"validation/images/{number}"
                writer.add_image(name, np.asarray(image), _step(trainer), dataformats="HWC")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the table, whose first column has the numbers of the images."""
        writer = _tensorboard(trainer)
        if writer is not None:
            lines = (f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * 5, *self.rows))
            writer.add_text("validation/answers", "\n".join(lines), _step(trainer))


def _tensorboard(trainer: Trainer) -> SummaryWriter | None:
    """Return what writes to TensorBoard, on the first process, if it is among the loggers."""
    writers = (logger.experiment for logger in trainer.loggers)
    return next((writer for writer in writers if isinstance(writer, SummaryWriter)), None)


def _step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs metrics now: that of the latest loss, for a validation after it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


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
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
        trainer.strategy.barrier()
