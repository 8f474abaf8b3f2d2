"""The data of a probe run: images with masks, by whatever layout they come in."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .folder import FolderDataset
from .prepared import CachedStates, Prepared, collate

DATASETS: dict[str, Callable[[str, str], Dataset]] = {"folder": FolderDataset}


def open_dataset(dataset: str, root: str, split: str) -> Dataset:
    """A split ("training", "validation") of a dataset in a registered layout."""
    if dataset not in DATASETS:
        raise ValueError(f"unknown data.dataset {dataset!r}; registered: {', '.join(DATASETS)}")
    return DATASETS[dataset](root, split)


class SegmentationData(LightningDataModule):
    """Training and validation images with masks.

    Args:
        root: Folder of the dataset.
        dataset: Its layout: "folder" is ADE20K's with a classes.json.
        name: What reports call it; None takes the folder's name.
        batch_size: Images of a batch over all devices. The paper has 64.
        cache: Keeps all states in memory, so that the frozen forward runs once and not once an epoch.
        num_workers: Processes on each device that open images.
        seed: Decides the order of training images.
    """

    def __init__(
        self,
        root: str,
        dataset: str = "folder",
        name: str | None = None,
        batch_size: int = 64,
        cache: bool = False,
        num_workers: int = 4,
        seed: int = 0,
    ):
        super().__init__()
        self.splits = {split: open_dataset(dataset, root, split) for split in ("training", "validation")}
        self.root, self.dataset, self.name = root, dataset, name or Path(root).resolve().name
        self.classes = self.splits["training"].classes
        self.num_classes = len(self.classes)
        self.batch_size, self.cache, self.num_workers, self.seed = batch_size, cache, num_workers, seed
        self._sources: dict[str, Dataset] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training images."""
        return math.ceil(len(self.splits["training"]) / self.batch_size)

    def train_dataloader(self) -> DataLoader:
        return self._loader("training", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("validation", shuffle=False)

    test_dataloader = val_dataloader

    def _loader(self, split: str, shuffle: bool) -> DataLoader:
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        if self.batch_size % ranks:
            raise ValueError(f"data.batch_size {self.batch_size} does not divide by {ranks} devices")
        source = self._source(split)
        return DataLoader(
            source,
            batch_size=self.batch_size // ranks,
            # it tops the last round up with images that another rank has too; the metric drops them by their index
            sampler=DistributedSampler(source, ranks, rank, shuffle=shuffle, seed=self.seed),
            num_workers=0 if self.cache else self.num_workers,
            collate_fn=_as_it_is if self.cache else collate,
            pin_memory=torch.cuda.is_available(),
        )

    def _source(self, split: str) -> Dataset:
        if split not in self._sources:
            module = self.trainer.lightning_module
            prepared = Prepared(self.splits[split], module.mllm.preprocess)
            self._sources[split] = (
                CachedStates(module.mllm, prepared, module.sites, self.batch_size, f"{self.name} {split}")
                if self.cache
                else prepared
            )
        return self._sources[split]


def _as_it_is(batch: dict) -> dict:
    return batch
