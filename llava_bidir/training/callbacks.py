"""What happens around training: throughput, answers to look at, and the export of the finished model."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from llava_bidir.model.hf_export import export_hf
from llava_bidir.model.lora import merge_lora
from llava_bidir.model.modeling_llava_bidir import build_mask

from .deepspeed_strategy import gathered


class ShowAnswers(Callback):
    """Writes validation images with the model's answers, and the attention mask as a picture, to TensorBoard.

    Args:
        images: How many samples of the first validation batch are shown.
    """

    def __init__(self, images: int = 4):
        self.images = images

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        board = trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None
        if board is None or batch_idx > 0:
            return
        step = trainer.global_step
        model, processor = pl_module.model, pl_module.processor
        if batch["pixel_values"] is not None:
            board.add_images("validation/images", _visible(batch["pixel_values"][: self.images], processor), step)
        board.add_text("validation/answers", self._table(batch, outputs, processor.tokenizer), step)
        # the mask of the first prompt: white where a row (query) may attend to a column (key)
        prompt = batch["prompts"]["input_ids"][:1]
        mask = build_mask(
            model.config.image_attention,
            model.config.get_text_config(),
            prompt == model.config.image_token_id,
            batch["prompts"]["attention_mask"][:1],
        )
        board.add_image("validation/attention_mask", _allowed(mask)[0].float(), step)

    def _table(self, batch: dict, answers: list[str], tokenizer) -> str:
        rows = ["| record | question | expected | answered |", "|---|---|---|---|"]
        for i in range(min(self.images, len(answers))):
            question = tokenizer.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
            question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
            rows.append(f"| {batch['ids'][i]} | {question} | {batch['answers'][i]} | {answers[i]} |")
        return "\n".join(rows)


def _visible(pixels: Tensor, processor) -> Tensor:
    """f[B, 3, H, W] of normalised pixels back to 0..1."""
    mean, std = (torch.tensor(x, device=pixels.device)[:, None, None] for x in _statistics(processor))
    return (pixels * std + mean).clamp(0, 1)


def _statistics(processor) -> tuple[list[float], list[float]]:
    return processor.image_processor.image_mean, processor.image_processor.image_std


def _allowed(mask: Tensor) -> Tensor:
    """bool of a mask that is bool already (sdpa) or additive (eager: 0 where allowed)."""
    return mask if mask.dtype == torch.bool else mask == 0


class ExportModel(Callback):
    """Writes the finished model as a Hugging Face directory, `hf/` in the run's folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with gathered(pl_module.model):  # all ranks, for under ZeRO-3 each has a part
            if trainer.is_global_zero:
                self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = pl_module.facts() | pl_module.progress()
        export_hf(merge_lora(pl_module.model), pl_module.processor, Path(trainer.default_root_dir) / "hf", facts)
