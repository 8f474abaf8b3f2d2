"""Callbacks that write predictions: maps to the logger, and a file of every prediction."""

from pathlib import Path

import numpy as np
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from llava_bidir.common.logged_media import log_images, media_loggers
from probes.data.batches import group_by_mask_size
from probes.data.palette import colorize, palette_of
from probes.tasks.base import predict_pixels


class ShowMaps(Callback):
    """Log the predictions of the first validation images at each site, and their targets.

    Args:
        images: Number of images.
    """

    def __init__(self, images: int = 4):
        self.images = images

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the maps of the first batch."""
        if batch_idx > 0 or not media_loggers(trainer):
            return
        task, palette = pl_module.task, palette_of(trainer.datamodule.splits["validation"])
        colours = lambda maps: np.stack([task.colorize(x) for x in maps]) if task else colorize(maps, palette)
        images, target = group_by_mask_size(batch["target"])[0]
        logits_by_site, target = outputs[:, images][:, : self.images], target[: self.images]
        size = tuple(target.shape[1:3])
        view = pl_module.mllm.geometry.view(size)
        for site, logits in zip(pl_module.sites, logits_by_site, strict=True):
            log_images(trainer, f"maps/{site}", colours(predict_pixels(task, logits, size, view)))
        log_images(trainer, "maps/truth", colours((task.truth(target) if task else target).cpu().numpy()))


class SavePredictions(Callback):
    """Write the predicted class of every pixel, by each probe of its best epoch, to RUN/predictions/SITE/NAME.png.

    Other tasks than segmentation write NAME.npy, float32 in the format of their targets.
    """

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the predictions of a batch."""
        names, out = trainer.datamodule.splits["validation"].names, Path(trainer.default_root_dir) / "predictions"
        for images, target in group_by_mask_size(batch["target"]):
            size, task = tuple(target.shape[1:3]), pl_module.task
            view = pl_module.mllm.geometry.view(size)
            for site, logits_by_image in zip(pl_module.sites, outputs[:, images], strict=True):
                (out / site).mkdir(parents=True, exist_ok=True)
                for i, logits in zip(batch["index"][images].tolist(), logits_by_image, strict=True):
                    prediction = predict_pixels(task, logits, size, view)
                    if task:
                        np.save(out / site / f"{names[i]}.npy", prediction)
                    else:
                        Image.fromarray(prediction).save(out / site / f"{names[i]}.png")
