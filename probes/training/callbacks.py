"""What a probe run leaves to look at: maps in TensorBoard, and every prediction as PNG if asked for."""

from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from probes.data.batches import group_by_mask_size
from probes.data.palette import coloured, palette_of
from probes.ops.bilinear import upsampled_argmax


class CatchUpValidation(Callback):
    """Validates after a resume from between an epoch's last step and its validation: Lightning would leave it out."""

    def __init__(self):
        self.validated_step = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs, rest = divmod(trainer.global_step, trainer.datamodule.steps_per_epoch)
        if rest or epochs % (trainer.check_val_every_n_epoch or 1) or self.validated_step == trainer.global_step:
            return
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # from its first batch on
        trainer.validating = True
        validation.run()
        trainer.training = True

    def state_dict(self) -> dict[str, int]:
        return {"validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.validated_step = state_dict["validated_step"]


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
        images, target = group_by_mask_size(batch["target"])[0]
        shown, target = outputs[:, images][:, : self.images], target[: self.images]
        size = target.shape[-2:]
        board, step, view = trainer.logger.experiment, trainer.global_step, pl_module.mllm.geometry.view(size)
        for site, logits in zip(pl_module.sites, shown, strict=True):
            pictures = coloured(upsampled_argmax(logits, size, view).cpu().numpy(), palette)
            board.add_images(f"maps/{site}", pictures, step, dataformats="NHWC")
        board.add_images("maps/truth", coloured(target.cpu().numpy(), palette), step, dataformats="NHWC")


class SavePredictions(Callback):
    """Writes the predicted class of every pixel, each probe at its best epoch: RUN/predictions/SITE/NAME.png."""

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        names, out = trainer.datamodule.splits["validation"].names, Path(trainer.default_root_dir) / "predictions"
        for images, target in group_by_mask_size(batch["target"]):
            size = target.shape[-2:]
            view = pl_module.mllm.geometry.view(size)
            for site, logits in zip(pl_module.sites, outputs[:, images], strict=True):
                (out / site).mkdir(parents=True, exist_ok=True)
                for i, of_image in zip(batch["index"][images].tolist(), logits, strict=True):
                    mask = upsampled_argmax(of_image, size, view).to(torch.uint8).cpu().numpy()
                    Image.fromarray(mask).save(out / site / f"{names[i]}.png")
