"""What a probe run leaves to look at: maps in TensorBoard, and every prediction as PNG if asked for."""

from pathlib import Path

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from .module import by_size
from .palette import coloured, palette_of
from .upsample import upsampled_argmax


class ShowMaps(Callback):
    """Writes the predictions of the first validation images at each site, and their truth, to TensorBoard.

    Args:
        images: How many.
    """

    def __init__(self, images: int = 4):
        self.images = images

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx > 0 or not isinstance(trainer.logger, TensorBoardLogger):
            return
        palette = palette_of(trainer.datamodule.splits["validation"])
        images, target = by_size(batch["target"])[0]
        shown, target = outputs[:, images][:, : self.images], target[: self.images]
        size = target.shape[-2:]
        maps = coloured(upsampled_argmax(shown, size, pl_module.mllm.geometry.view(size)).cpu().numpy(), palette)
        board, step = trainer.logger.experiment, trainer.global_step
        for site, pictures in zip(pl_module.sites, maps, strict=True):
            board.add_images(f"maps/{site}", pictures, step, dataformats="NHWC")
        board.add_images("maps/truth", coloured(target.cpu().numpy(), palette), step, dataformats="NHWC")


class SavePredictions(Callback):
    """Writes the predicted class of every pixel, each probe at its best epoch: RUN/predictions/SITE/NAME.png."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        names, out = trainer.datamodule.splits["validation"].names, Path(trainer.default_root_dir) / "predictions"
        for images, target in by_size(batch["target"]):
            size = target.shape[-2:]
            predicted = upsampled_argmax(outputs[:, images], size, pl_module.mllm.geometry.view(size))
            predicted = predicted.to(torch.uint8).cpu().numpy()
            for site, masks in zip(pl_module.sites, predicted, strict=True):
                (out / site).mkdir(parents=True, exist_ok=True)
                for i, mask in zip(batch["index"][images].tolist(), masks, strict=True):
                    Image.fromarray(np.ascontiguousarray(mask)).save(out / site / f"{names[i]}.png")
