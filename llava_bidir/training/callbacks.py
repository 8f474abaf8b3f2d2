"""Callbacks: validation answers in TensorBoard, and export of the trained model."""

from copy import copy
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from llava_bidir.model.hf_export import export_hf
from llava_bidir.model.modeling_llava_bidir import build_mask

from .deepspeed_strategy import ZeRO, gather_parameters


class ShowAnswers(Callback):
    """Log validation images, the model's answers and the attention mask to TensorBoard.

    Args:
        images: Number of samples of the first validation batch to log.
    """

    def __init__(self, images: int = 4):
        self.images = images

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the first batch."""
        board = trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None
        if board is None or batch_idx > 0:
            return
        step = trainer.global_step
        model, processor = pl_module.model, pl_module.processor
        if batch["pixel_values"] is not None:
            pixels = _unnormalize(batch["pixel_values"][: self.images], processor.image_processor)
            board.add_images("validation/images", pixels, step)
        board.add_text("validation/answers", self._table(batch, outputs, processor.tokenizer), step)
        # the mask of the first prompt: white where a row (query) attends to a column (key)
        prompt = batch["prompts"]["input_ids"][:1]
        llm_config = copy(model.config.get_text_config())
        llm_config._attn_implementation = "sdpa"  # the only backend whose mask is bool[B, 1, N, N]
        is_image, padding = prompt == model.config.image_token_id, batch["prompts"]["attention_mask"][:1]
        mask = build_mask(model.config.image_attention, llm_config, is_image, padding)
        board.add_image("validation/attention_mask", mask[0].float(), step)

    def _table(self, batch: dict, answers: list[str], tokenizer) -> str:
        rows = ["| record | question | expected | answered |", "|---|---|---|---|"]
        for i in range(min(self.images, len(answers))):
            question = tokenizer.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
            question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
            rows.append(f"| {batch['ids'][i]} | {question} | {batch['answers'][i]} | {answers[i]} |")
        return "\n".join(rows)


def _unnormalize(pixels: Tensor, processor) -> Tensor:
    """Return normalised pixels f[B, 3, H, W] as 0..1."""
    mean, std = pixels.new_tensor([processor.image_mean, processor.image_std])[..., None, None]
    return (pixels * std + mean).clamp(0, 1)


class ExportModel(Callback):
    """Export the trained model to `hf/` in the run's folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on rank 0; all ranks enter, because under ZeRO-3 each holds a shard."""
        if isinstance(trainer.strategy, ZeRO):
            trainer.strategy.finish_save()  # a run is finished if its export is newer than its last checkpoint
        with gather_parameters(pl_module.model):
            if trainer.is_global_zero:
                training = pl_module.settings() | pl_module.progress() | {"identity": pl_module.identity}
                out = Path(trainer.default_root_dir) / "hf"
                export_hf(pl_module.model, pl_module.processor, out, training)
