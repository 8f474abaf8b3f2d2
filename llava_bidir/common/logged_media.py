"""Pictures and tables in the loggers that show them: TensorBoard and Weights & Biases."""

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def media_loggers(trainer: Trainer) -> list[Logger]:
    """Return the trainer's loggers that show pictures, on the first process; none on the others."""
    shows = lambda logger: isinstance(logger, TensorBoardLogger | WandbLogger)
    return list(filter(shows, trainer.loggers)) if trainer.is_global_zero else []


def log_images(trainer: Trainer, name: str, images: np.ndarray) -> None:
    """Log images uint8[B, H, W, 3]."""
    step = trainer.global_step
    for logger in media_loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_images(name, images, step, dataformats="NHWC")
        else:
            logger.log_image(name, list(images), step)


def log_table(trainer: Trainer, name: str, columns: list[str], rows: list[list[str]]) -> None:
    """Log rows of text."""
    step = trainer.global_step
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))
    for logger in media_loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, step)
        else:
            logger.log_text(name, columns, rows, step=step)
