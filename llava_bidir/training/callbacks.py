"""Validation answers in the logger."""

from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from torch.utils.tensorboard import SummaryWriter

from llava_bidir.data.conversation import IMAGE_PLACEHOLDER

from .module import SHOWN

LARGEST_PX = 448  # side of an image in the event file


class ShowAnswers(Callback):
    """Log the first validation images with question, expected and given answer to TensorBoard."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: list[str],
        batch: dict[str, Any],
        batch_idx: int,
        *args: Any,
    ) -> None:
        """Log the samples of the batch that are among the first, on the first process."""
        writers = (logger.experiment for logger in trainer.loggers)
        writer = next((writer for writer in writers if isinstance(writer, SummaryWriter)), None)
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
