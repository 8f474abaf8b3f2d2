"""Callbacks: learning rates and validation answers in the logger, and exports on the way."""

import shutil
from collections.abc import (
    Iterable,
    Iterator,
    Sequence,
)
from pathlib import Path
from typing import Any

import numpy as np
from lightning import (
    Callback,
    LightningModule,
    Trainer,
)
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from llava_bidir.model.build import no_zero3_partitioning

from .module import SHOWN
from .read_checkpoint import export_checkpoint

COLUMNS = ("image", "record", "question", "expected", "answered")


class LogLearningRate(LearningRateMonitor):
    """Log the learning rates of each step, once for all of its micro-batches."""

    def on_train_start(
        self,
        trainer: Trainer,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Note the names of the learning rates; with `--trainer.logger false` there is nothing to log."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Log at the first micro-batch of a step."""
        if trainer.loggers and batch_idx % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer)


class ShowAnswers(Callback):
    """Log the first validation images with question, expected and given answer to TensorBoard."""

    def on_validation_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
    ) -> None:
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
        processor = pl_module.processor
        first = len(self.rows)
        answers = zip(batch["answers"], outputs, strict=False)
        for i, (expected, answer) in enumerate([*answers][: SHOWN - first]):
            question = processor.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
            question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
            cells = [str(first + i), str(batch["ids"][i]), question, expected, answer]
            self.rows.append(cells)
        for i, image in _first_images(batch, range(len(self.rows) - first), processor):
            name = f"validation/images/{first + i}"
            writer.add_image(name, image, _step(trainer), dataformats="HWC")

    def on_validation_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
    ) -> None:
        """Log the table, whose first column has the numbers of the images."""
        writer = _tensorboard(trainer)
        if writer is not None:
            lines = (f"| {' | '.join(cells)} |" for cells in (COLUMNS, ["---"] * 5, *self.rows))
            writer.add_text("validation/answers", "\n".join(lines), _step(trainer))


def _tensorboard(trainer: Trainer) -> SummaryWriter | None:
    """Return what writes to TensorBoard, on the first process, if it is among the loggers."""
    for logger in trainer.loggers:
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            return logger.experiment
    return None


def _step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs metrics now: that of the latest loss, for a validation after it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def _first_images(
    batch: dict[str, Any], samples: Iterable[int], processor
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first image of each sample that shows one, with the sample's index: uint8[H, W, 3]."""
    images = (batch["input_ids"] == processor.image_token_id).sum(1) // batch["image_tokens"]
    first = (images.cumsum(0) - images).tolist()
    for i in samples:
        if images[i]:
            yield i, _as_bytes(batch["pixel_values"][first[i]], processor.image_processor)


def _as_bytes(pixels: Tensor, processor) -> np.ndarray:
    """Return a normalised image f[3, H, W] as uint8[H, W, 3]."""
    mean, std = pixels.new_tensor([processor.image_mean, processor.image_std])[..., None, None]
    image = (pixels * std + mean).clamp(0, 1).float() * 255
    return image.round().byte().movedim(0, -1).cpu().numpy()


class ExportSteps(Callback):
    """Also export the model on the way, after some steps, to `steps/STEP/hf` in the run's folder.

    Args:
        steps: Optimizer steps, e.g. [60, 200].
    """

    def __init__(self, steps: Sequence[int]):
        self.steps = set(steps)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        *args: Any,
    ) -> None:
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
