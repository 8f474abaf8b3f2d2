"""Callbacks: validation answers in the logger, and export of the trained model."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from llava_bidir.common.logged_media import log_table, media_loggers
from llava_bidir.model.hf_export import export_hf

from .deepspeed_strategy import gather_parameters


class ShowAnswers(Callback):
    """Log the model's answers to the first validation questions.

    Args:
        count: Number of answers to log.
    """

    def __init__(self, count: int = 4):
        self.count = count

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Log the first batch."""
        if batch_idx > 0 or not media_loggers(trainer):
            return
        columns = ["record", "question", "expected", "answered"]
        log_table(trainer, "validation/answers", columns, self._rows(batch, outputs, pl_module.processor.tokenizer))

    def _rows(self, batch: dict, answers: list[str], tokenizer) -> list[list[str]]:
        rows = []
        for i in range(min(self.count, len(answers))):
            question = tokenizer.decode(batch["prompts"]["input_ids"][i], skip_special_tokens=True)
            question = question.rpartition("USER:")[2].removesuffix("ASSISTANT:").strip()
            rows.append([str(batch["ids"][i]), question, batch["answers"][i], answers[i]])
        return rows


class ExportModel(Callback):
    """Export the trained model to `hf/` in the run's folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on rank 0; all ranks enter, because under ZeRO-3 each holds a shard."""
        with gather_parameters(pl_module.model):
            if trainer.is_global_zero:
                training = pl_module.settings() | pl_module.progress() | {"identity": pl_module.identity}
                out = Path(trainer.default_root_dir) / "hf"
                export_hf(pl_module.model, pl_module.processor, out, training)
