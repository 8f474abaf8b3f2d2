"""Batches of images with the states of a frozen MLLM, on the device of a process, in several passes."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_bidir.common.progress import log_pass, logs_progress
from probes.data.batches import MaskPreparer
from probes.data.datamodule import ProbeData
from probes.training.distributed import rank, rank_count
from probes.training.site_probes import SiteProbes

from .objective import TIGHT_NODES
from .state_file import StateFile


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
        self.state_file: StateFile | None = None

    def share(self, images: Iterable[int]) -> list[list[int]]:
        """Return this process's share of images, in batches."""
        mine = list(images)[rank() :: rank_count()]
        size = self.data.rank_batch_size
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def keep_states(self, folder: Path, images: list[int]) -> None:
        """Write states to a file when they are first computed, and read them from there after that.

        Args:
            folder: On the disk that is used.
            images: Indices of this process's training images.
        """
        self.state_file = StateFile(folder, images)

    def training(self, batches: list[list[int]], label: str) -> Iterator[dict[str, Any]]:
        """Yield batches of training images with their "states"; the progress bar shows `label`."""
        loader = self.data.training_loader(batches)
        for batch in self._progress(loader, label):
            batch = move_data_to_device(batch, self.device)
            yield batch | {"states": self._states(batch)}

    def _states(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the states f[B, T, d] of a batch of training images by site."""
        images = batch["index"].tolist()
        file = self.state_file
        if file is not None and file.has(images):
            return file.read(images, self.device)
        with self.precision():
            states = self.probes.states(batch)
        if file is not None:
            file.write(images, states)
        return states

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
