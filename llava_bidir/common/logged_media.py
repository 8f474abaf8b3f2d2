"""Pictures and tables in the loggers that show them: TensorBoard, Weights & Biases and MLflow."""

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger


def media_loggers(trainer: Trainer) -> list[Logger]:
    """Return the trainer's loggers that show pictures, on the first process; none on the others."""
    kinds = (TensorBoardLogger, WandbLogger, MLFlowLogger)
    if trainer.is_global_zero:
        return [logger for logger in trainer.loggers if isinstance(logger, kinds)]
    return []


def _step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs metrics now: that of the latest loss, for a validation after it."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_images(trainer: Trainer, name: str, images: np.ndarray) -> None:
    """Log images uint8[B, H, W, 3]."""
    step = _step(trainer)
    for logger in media_loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_images(name, images, step, dataformats="NHWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, list(images), step)
        else:
            for i, image in enumerate(images):
                logger.experiment.log_image(logger.run_id, image, key=f"{name}/{i}", step=step)


def log_table(
    trainer: Trainer,
    name: str,
    columns: list[str],
    rows: list[list[str]],
) -> None:
    """Log rows of text."""
    step = _step(trainer)
    text = "\n".join(
        f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)
    )
    for logger in media_loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)
        elif isinstance(logger, WandbLogger):
            logger.log_text(name, columns, rows, step=step)
        else:
            logger.experiment.log_text(logger.run_id, text, f"{name}/{step}.md")
