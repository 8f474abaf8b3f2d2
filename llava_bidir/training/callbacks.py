"""Callbacks: validation answers in the logger, and exports of the trained model."""

from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor

from llava_bidir.common.logged_media import log_images, log_table, media_loggers
from llava_bidir.model.hf_export import export_hf
from llava_bidir.model.modeling_llava_bidir import build_mask

from .deepspeed_strategy import gather_parameters


class LogLearningRate(LearningRateMonitor):
    """Log the learning rates of each step, once for all of its micro-batches."""

    def __init__(self):
        super().__init__("step")

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch,
        batch_idx: int,
    ) -> None:
        """Log at the first micro-batch of a step."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer)


class ShowAnswers(Callback):
    """Log validation images, the model's answers and the attention mask.

    Args:
        images: Number of samples of the first validation batch to log.
    """

    def __init__(self, images: int = 4):
        self.images = images

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the first batch."""
        if batch_idx > 0 or not media_loggers(trainer):
            return
        model = pl_module.model
        processor = pl_module.processor
        if batch["pixel_values"] is not None:
            pixels = _unnormalize(batch["pixel_values"][: self.images], processor.image_processor)
            log_images(trainer, "validation/images", _as_bytes(pixels))
        columns = ["record", "question", "expected", "answered"]
        log_table(
            trainer, "validation/answers", columns, self._rows(batch, outputs, processor.tokenizer)
        )
        # the mask of the first prompt: white where a row (query) attends to a column (key)
        prompt = batch["prompts"]["input_ids"][:1]
        llm_config = copy(model.config.get_text_config())
        llm_config._attn_implementation = "sdpa"  # the only backend whose mask is bool[B, 1, N, N]
        is_image = prompt == model.config.image_token_id
        padding = batch["prompts"]["attention_mask"][:1]
        mask = build_mask(model.config.image_attention, llm_config, is_image, padding)
        log_images(
            trainer, "validation/attention_mask", _as_bytes(mask.float().expand(-1, 3, -1, -1))
        )

    def _rows(self, batch: dict, answers: list[str], tokenizer) -> list[list[str]]:
        rows = []
        for i in range(min(self.images, len(answers))):
            question = tokenizer.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
            question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
            rows.append([str(batch["ids"][i]), question, batch["answers"][i], answers[i]])
        return rows


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
    """Export on rank 0; all ranks enter, because under ZeRO-3 each holds a shard."""
    with gather_parameters(pl_module.model):
        if trainer.is_global_zero:
            training = (
                pl_module.settings() | pl_module.progress() | {"identity": pl_module.identity}
            )
            export_hf(pl_module.model, pl_module.processor, out, training)
