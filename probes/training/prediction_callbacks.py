"""Predictions of every pixel while probes are trained: maps in the logger, and files of the best epoch."""

from pathlib import Path

import numpy as np
from lightning import Callback, LightningModule, Trainer

from llava_bidir.common.logged_media import log_images, media_loggers
from probes.data.batches import group_by_size
from probes.data.palette import palette_of

from .prediction_files import save_predictions


class ShowMaps(Callback):
    """Log the predictions of the first validation images at each site, and their targets.

    Args:
        images: Number of images.
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
        """Write the maps of the first batch."""
        if batch_idx > 0 or not media_loggers(trainer):
            return
        probes = pl_module.probes
        task = probes.task
        palette = palette_of(trainer.datamodule.splits["validation"])
        images, target = group_by_size(batch["target"])[0]
        logits_by_site = outputs[:, images][:, : self.images]
        target = target[: self.images]
        size = tuple(target.shape[1:3])
        view = probes.mllm.geometry.view(size)
        maps = {
            site: task.predict_pixels(logits, size, view)
            for site, logits in zip(probes.sites, logits_by_site, strict=True)
        }
        maps["truth"] = task.truth(target).cpu().numpy()
        for name, of_images in maps.items():
            colours = np.stack([task.colorize(x, palette) for x in of_images])
            log_images(trainer, f"maps/{name}", colours)


class SavePredictions(Callback):
    """Write the predictions of each probe of its best epoch to RUN/predictions/SITE; see `save_predictions`."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the predictions of a batch."""
        names = trainer.datamodule.splits["validation"].names
        folder = Path(trainer.default_root_dir) / "predictions"
        save_predictions(pl_module.probes, outputs, batch, names, folder)
