"""Settings, name and final metrics of a run, and validation answers, in TensorBoard."""

from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from tensorboard.plugins.hparams import summary_v2 as hparams
from torch.utils.tensorboard import SummaryWriter

from llava_bidir.common.runs import optimizer_steps
from llava_bidir.data.collate import Batch
from llava_bidir.data.conversation import IMAGE_PLACEHOLDER

from .module import SHOWN

LARGEST_PX = 448  # side of an image in the event file

# Of the HParams page; hp_metric is the last loss of the validation, or of the training without one
METRICS = ("hp_metric", "train/loss", "val/loss", "val/answer_accuracy")


def tensorboard_of(trainer: Trainer) -> SummaryWriter | None:
    """Return the writer of TensorBoard on the first process, None on others and without one."""
    writers = (logger.experiment for logger in trainer.loggers)
    return next((writer for writer in writers if isinstance(writer, SummaryWriter)), None)


class ShowSettings(Callback):
    """Log settings and final metrics to TensorBoard's HParams, under a name with folder, stage, encoder and mask."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the settings."""
        writer = tensorboard_of(trainer)
        if writer is None:
            return
        model = pl_module.hparams
        stage = 2
        if model.trainable == ["adapter"]:
            stage = 1
        settings = {
            "stage": stage,
            "encoder": model.encoder["name"] or Path(model.encoder["path"]).name,
            "mask": model.image_attention,
            "llm": model.llm,
            "learning_rate": model.learning_rate,
            "lora": model.lora is not None,
            "batch_size": trainer.datamodule.batch_size,
            "steps": optimizer_steps(trainer),
        }
        name = "{0}: stage {stage}, {encoder}, {mask}".format(trainer.default_root_dir, **settings)
        columns = map(hparams.HParam, settings)
        metrics = map(hparams.Metric, METRICS)
        file = writer.file_writer
        file.add_summary(hparams.hparams_config_pb([*columns], [*metrics]))
        file.add_summary(hparams.hparams_pb(settings, trial_id=name))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the final metric."""
        measured = trainer.callback_metrics
        loss = measured.get("val/loss", measured.get("train/loss"))
        writer = tensorboard_of(trainer)
        if writer is not None and loss is not None:
            writer.add_scalar("hp_metric", loss, trainer.global_step)


class ShowAnswers(Callback):
    """Log the first validation images with question, expected and given answer to TensorBoard."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[str],
        batch: Batch,
        batch_idx: int,
        *args: Any,
    ) -> None:
        """Log the samples of the batch that are among the first, on the first process."""
        writer = tensorboard_of(trainer)
        first = batch_idx * trainer.datamodule.micro_batch_size
        if writer is None:
            return
        # that of the latest loss, as Lightning logs metrics now
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        keys = ("images", "ids", "questions", "answers")
        samples = zip(*(batch[key] for key in keys), outputs, strict=False)
        for number, (image, *texts) in enumerate([*samples][: max(SHOWN - first, 0)], first):
            if image is not None:
                image.thumbnail((LARGEST_PX, LARGEST_PX))
                name = f"validation/images/{number}"
                writer.add_image(name, np.asarray(image), step, dataformats="HWC")
            record, question, expected, answered = (
                " ".join(text.replace(IMAGE_PLACEHOLDER, "").split()) for text in texts
            )
            text = f"{record}: {question} Expected: {expected}. Answered: {answered}"
            writer.add_text(f"validation/answers/{number}", text, step)
