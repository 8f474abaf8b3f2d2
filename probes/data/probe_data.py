"""Images and targets of a probe run, checked and in batches, shared among its processes."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import (
    all_gather_objects,
    limit_workers,
    rank,
    rank_count,
    rank_zero_warn,
    worker_options,
)
from probes.config import DataOptions
from probes.tasks import SEGMENTATION

from .base import shared_images
from .batches import CachedFeatures, MaskPreparer, PreprocessedDataset, collate
from .registry import open_split, split_identity
from .samplers import validation_batches
from .verify import (
    LabelCounts,
    add_counts,
    check_labels,
    find_bad_files,
    format_bad_files,
    join_counts,
    label_notes,
    leave_out_unlabelled,
    shared_image_note,
)

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM


class Reader(NamedTuple):
    """What images are read for, see :meth:`ProbeData.read_for`."""

    mllm: "FrozenMLLM"
    sites: list[str]
    prepare: MaskPreparer | None


class ProbeData:
    """Training and validation images with masks, or with the targets of another task.

    Args:
        root: Folder of the dataset.
        seed: Random seed of the order of training images; linked from seed_everything by the command line.
        **options: Other fields of :class:`probes.config.DataOptions`.

    Raises:
        UserError: There is no such layout or task, or the folder is not of the layout.
    """

    def __init__(
        self,
        root: str,
        seed: int = 0,
        **options,
    ):
        super().__init__()  # of LightningDataModule, in a run that trains
        config = DataOptions(root=root, **options)
        self.settings = asdict(config) | {"seed": seed}

        self.splits = {split: open_split(config, split) for split in ("training", "validation")}
        self.root = root
        self.dataset = config.dataset
        self.task = config.task
        self.options = config.options or {}
        self.name = config.name or Path(root).resolve().name
        self.classes = self.splits["training"].classes
        self.num_classes = len(self.classes)
        self.batch_size = config.batch_size
        self.num_workers = limit_workers(config.num_workers)
        self.seed = seed
        self.labels: dict[str, LabelCounts] = {}  # by split, after the files were checked
        self.shared_images: list[tuple[str, str]] = []
        self._sources: dict[str, Dataset] = {}
        self._reader: Reader | None = None

    @property
    def hparams(self) -> dict[str, Any]:
        """Options of the data, as a LightningDataModule names them."""
        return self.settings

    def identity(self) -> dict[str, str]:
        """Return what the data is: classes, and names and contents of all images and targets."""
        parts = [split_identity(split, dataset) for split, dataset in self.splits.items()]
        return {key: value for identity in parts for key, value in identity.items()}

    def verify(self, show_bar: bool) -> None:
        """Read every image and target once, before the model is loaded; each rank reads its share.

        Args:
            show_bar: Whether the first process shows a progress bar.

        Raises:
            UserError: If some cannot be used; the message is the same on all ranks and names the files.
        """
        bar = show_bar and rank() == 0
        found = self.find_bad_files(self.num_workers, rank(), rank_count(), bar)
        shares = all_gather_objects((found, self.labels))
        bad_files = sum((bad for bad, _ in shares), [])
        self.labels = {
            split: join_counts([labels[split] for _, labels in shares]) for split in self.labels
        }
        self.check_files(bad_files)
        self.shared_images = shared_images(self.splits["training"], self.splits["validation"])
        for note in self.notes():
            rank_zero_warn(f"{self.root}: {note}")

    def notes(self) -> list[str]:
        """Return what a reader of scores must know about labels and images, after the files were checked."""
        notes = label_notes(self.classes, self.labels)
        return notes + ([shared_image_note(self.shared_images)] if self.shared_images else [])

    def check_files(self, bad_files: list[tuple[str, str]]) -> None:
        """Raise a UserError if some of the files cannot be used, or their labels are not those of the classes."""
        splits = {f"{self.name} {split}": dataset for split, dataset in self.splits.items()}
        if unusable := leave_out_unlabelled(bad_files, splits):
            raise UserError(
                f"{self.root}: {format_bad_files(unusable, sum(map(len, splits.values())))}"
            )
        if self.labels and self.task == SEGMENTATION:
            check_labels(self.classes, self.labels, self.dataset == "folder", self.root)

    def find_bad_files(
        self,
        workers: int,
        first: int = 0,
        step: int = 1,
        progress: bool = True,
    ) -> list[tuple[str, str]]:
        """Return what `check_files` takes, of the images first, first + step, ... of both splits."""
        bad_files = []
        for split, dataset in self.splits.items():
            if (published := dataset.official_size) not in (None, len(dataset)):
                rank_zero_warn(
                    f"{self.root}: {len(dataset):,} {split} images, but {published:,} were published"
                )
            share = range(first, len(dataset), step)
            counts: list[ndarray] = []
            bad_files += find_bad_files(
                dataset, f"{self.name} {split}", share, workers, progress, counts
            )
            self.labels[split] = add_counts(counts, len(dataset.classes))
        return bad_files

    def validation_loader(self) -> DataLoader:
        """Return the loader of the validation images."""
        source = self._source("validation")
        batches = validation_batches(len(source), self.rank_batch_size, rank(), rank_count())
        return self._loader(source, batches)

    def training_loader(self, batches: list[list[int]]) -> DataLoader:
        """Return the loader of batches of training images, for a pass of `probes solve`."""
        return self._loader(self._source("training"), batches)

    @property
    def rank_batch_size(self) -> int:
        """Images per batch of a rank."""
        return math.ceil(self.batch_size / rank_count())

    def read_for(
        self,
        mllm: "FrozenMLLM",
        sites: list[str],
        prepare: MaskPreparer | None,
    ) -> None:
        """Set what images are read for, by the loaders that follow.

        Args:
            mllm: The model that preprocesses them.
            sites: Sites whose states are cached, if they are.
            prepare: Prepares training masks for the loss; None to leave them.
        """
        reader = Reader(mllm, sites, prepare)
        if reader != self._reader:
            self._sources.clear()
        self._reader = reader

    def _loader(self, source: Dataset, batches) -> DataLoader:
        is_cached = isinstance(source, CachedFeatures)
        return DataLoader(
            source,
            batch_sampler=batches,
            **worker_options(0 if is_cached else self.num_workers),
            collate_fn=_identity if is_cached else collate,
            pin_memory=torch.cuda.is_available(),
        )

    def _source(self, split: str) -> Dataset:
        if split not in self._sources:
            self._sources[split] = self._open_source(split)
        return self._sources[split]

    def _open_source(self, split: str) -> Dataset:
        """Return the images of a split as the model of :meth:`read_for` takes them."""
        mllm, _, prepare = self._reader
        return PreprocessedDataset(
            self.splits[split], mllm.preprocess, prepare if split == "training" else None
        )


def _identity(batch: dict) -> dict:
    return batch
