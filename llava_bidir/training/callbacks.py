"""Callbacks: validation answers in the logger, and exports of the trained model."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from llava_bidir.model.export import export_hf
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

from .deepspeed_strategy import gather_parameters
from .fsdp2_strategy import FSDP2
from .module import SHOWN
from .read_checkpoint import rebuild

COLUMNS = ("image", "record", "question", "expected", "answered")


class LogLearningRate(LearningRateMonitor):
    """Log the learning rates of each step, once for all of its micro-batches."""

    def __init__(self):
        super().__init__("step")

    def on_train_start(self, trainer: Trainer, *args, **kwargs) -> None:
        """Note the names of the learning rates; with `--trainer.logger false` there is nothing to log."""
        if trainer.loggers:
            super().on_train_start(trainer, *args, **kwargs)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch,
        batch_idx: int,
    ) -> None:
        """Log at the first micro-batch of a step."""
        if trainer.loggers and batch_idx % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer)


class ShowAnswers(Callback):
    """Log the first validation images with question, expected and given answer to TensorBoard."""

    def __init__(self):
        self.rows: list[list[str]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        self.rows = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the samples of the batch that are among the first."""
        writer = _tensorboard(trainer)
        if writer is None:
            return
        first = len(self.rows)
        tokenizer = pl_module.processor.tokenizer
        self.rows += _rows(batch, outputs, tokenizer, first)[: SHOWN - first]
        added = range(len(self.rows) - first)
        for i, pixels in _first_images(batch, added, pl_module.processor):
            name = f"validation/images/{first + i}"
            writer.add_images(name, pixels, _step(trainer), dataformats="NHWC")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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


def _rows(
    batch: dict,
    answers: list[str],
    tokenizer,
    first: int,
) -> list[list[str]]:
    """Return number, record, question, expected and given answer of each sample that was answered."""
    rows = []
    for i, (expected, answer) in enumerate(zip(batch["answers"], answers, strict=False)):
        question = tokenizer.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
        question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
        rows.append([str(first + i), str(batch["ids"][i]), question, expected, answer])
    return rows


def _first_images(
    batch: dict, samples: Iterable[int], processor
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first image of each sample that shows one, with the sample's index: uint8[1, H, W, 3]."""
    tokens = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
    images_before = 0
    per_image = batch["image_tokens"]
    for i in samples:
        if tokens[i]:
            pixels = batch["pixel_values"][images_before : images_before + 1]
            yield i, _as_bytes(_unnormalize(pixels, processor.image_processor))
        images_before += tokens[i] // per_image


def _unnormalize(pixels: Tensor, processor) -> Tensor:
    """Return normalised pixels f[B, 3, H, W] as 0..1."""
    mean, std = pixels.new_tensor([processor.image_mean, processor.image_std])[..., None, None]
    return (pixels * std + mean).clamp(0, 1)


def _as_bytes(images: Tensor) -> np.ndarray:
    """Return images f[B, 3, H, W] of 0..1 as uint8[B, H, W, 3]."""
    return (images.float() * 255).round().byte().movedim(1, -1).cpu().numpy()


class ExportModel(Callback):
    """Export the trained model to `hf/` in the run's folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on rank 0."""
        _export(trainer, pl_module, Path(trainer.default_root_dir) / "hf")


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
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Export after the last micro-batch of a step; a resumed run exports again what it repeats."""
        step = trainer.global_step
        if step in self.steps and not trainer.fit_loop.epoch_loop._should_accumulate():
            _export(trainer, pl_module, Path(trainer.default_root_dir) / f"steps/{step}/hf")


def _export(trainer: Trainer, pl_module: LightningModule, out: Path) -> None:
    """Export on rank 0; all ranks enter, because under ZeRO-3 and FSDP2 each holds a shard."""
    with _complete_model(trainer, pl_module) as model:
        if trainer.is_global_zero:
            training = (
                pl_module.settings() | pl_module.progress() | {"identity": pl_module.identity}
            )
            export_hf(model, pl_module.processor, out, training)


@contextmanager
def _complete_model(
    trainer: Trainer, pl_module: LightningModule
) -> Iterator[LlavaBidirForConditionalGeneration]:
    """Yield the model with all of its weights on rank 0; all ranks must enter.

    ZeRO-3 gathers weights in place. The model of FSDP2 cannot be copied, and may hold rounded weights: the same is made
    of a checkpoint's content as by `llava-bidir export`.
    """
    if not isinstance(trainer.strategy, FSDP2):
        with gather_parameters(pl_module.model):
            yield pl_module.model
        return
    weights = trainer.strategy.lightning_module_state_dict()
    module = pl_module
    if trainer.is_global_zero:
        module = rebuild(pl_module.hparams, {"state_dict": weights})
    yield module.model
