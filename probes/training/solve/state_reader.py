"""Batches of images with the states of a frozen MLLM, on the device of a process, in several passes."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_bidir.common.progress import log_pass, logs_progress
from probes.data.batches import MaskPreparer
from probes.data.datamodule import ProbeData
from probes.training.distributed import rank, rank_count
from probes.training.site_probes import SiteProbes

from .objective import TIGHT_NODES


class StateReader:
    """Reads images and runs the frozen model on them.

    Args:
        probes: Model and sites.
        data: Images and targets.
        trainer: Says device and precision, and how progress is shown.
        masks: Prepare the masks of training images for the loss, as "masks" of a batch.
    """

    def __init__(
        self,
        probes: SiteProbes,
        data: ProbeData,
        trainer: Trainer,
        masks: bool,
    ):
        self.probes = probes
        self.data = data
        self.trainer = trainer
        self.device: torch.device = trainer.strategy.root_device
        mllm = probes.mllm
        prepare = MaskPreparer(mllm.geometry, probes.channels, TIGHT_NODES) if masks else None
        data.read_for(mllm, probes.sites, prepare)

    def share(self, images: Iterable[int]) -> list[list[int]]:
        """Return this process's share of images, in batches."""
        mine = list(images)[rank() :: rank_count()]
        size = self.data.rank_batch_size
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def training(self, batches: list[list[int]], label: str) -> Iterator[dict[str, Any]]:
        """Yield batches of training images with their "states"; the progress bar shows `label`."""
        loader = self.data.training_loader(batches)
        for batch in self._progress(loader, label):
            batch = move_data_to_device(batch, self.device)
            with self.precision():
                states = self.probes.states(batch)
            yield batch | {"states": states}

    def validation(self) -> Iterator[dict[str, Any]]:
        """Yield this process's batches of validation images."""
        for batch in self._progress(self.data.val_dataloader(), "scores"):
            batch = self.trainer.precision_plugin.convert_input(batch)
            yield move_data_to_device(batch, self.device)

    def precision(self) -> AbstractContextManager:
        """Return the context of a forward at the precision of the trainer."""
        return self.trainer.precision_plugin.forward_context()

    def _progress(self, loader: DataLoader, label: str) -> Iterable:
        """Show a bar on the first process, or lines of a log where no terminal shows a bar."""
        if logs_progress(self.trainer) and rank() == 0:
            return log_pass(loader)
        hidden = rank() > 0 or self.trainer.progress_bar_callback is None
        return tqdm(loader, label, disable=hidden, mininterval=5)
