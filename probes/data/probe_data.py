"""Images and targets of a probe run, checked and in batches, shared among its processes; `probes verify-data`."""

import math
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import atomic_write
from llava_bidir.common.processes import (
    all_gather_objects,
    rank,
    rank_count,
    rank_zero_warn,
    usable_cores,
    worker_options,
)
from probes.config import DataOptions, VerifyOptions
from probes.tasks import TASKS

from .batches import CachedFeatures, MaskPreparer, PreprocessedDataset, collate
from .blank import Preprocess, blanked
from .registry import identity_of_splits, open_splits, options_of_layout
from .samplers import validation_batches
from .verify import (
    LabelCounts,
    ReadPair,
    check_labels,
    check_pairs,
    data_notes,
    find_remarks,
    format_labels,
    group_copies,
    join_counts,
    read_pairs,
)


class ProbeData:
    """Training and validation images with masks, or with the targets of another task.

    Args:
        config: Options of the data.
        seed: Random seed of the order of training images.

    Raises:
        UserError: There is no such layout or task, or the folder is not of the layout.
    """

    def __init__(self, config: DataOptions, seed: int = 0):
        self.hparams: dict[str, Any] = asdict(config) | {"seed": seed}  # see `run_identity`
        self.is_blank = bool(config.blank)
        self.splits = open_splits(config, seed)
        self.root = config.root
        self.dataset = config.dataset
        self.task = config.task
        self.registered = [TASKS[config.task]]
        self.options = options_of_layout(config, seed)
        self.name = config.name or Path(config.root).resolve().name
        self.classes = self.splits["training"].classes
        self.num_classes = len(self.classes)
        self.batch_size = config.batch_size
        self.num_workers = min(config.num_workers, usable_cores())
        self.seed = seed
        self.labels: dict[str, LabelCounts] = {}  # by split, after the files were checked
        self.remarks: dict[str, list] = {}  # on images, likewise
        self.pixels: list[
            Sequence[int]
        ] = []  # of each class in each image, in the order of the splits, likewise

    def identity(self) -> dict[str, str]:
        """Return what the data is: classes, and names and contents of all images and targets."""
        return identity_of_splits(self.splits)

    def verify(self, show_bar: bool, warn: Callable[[str], None] = rank_zero_warn) -> None:
        """Read every image and target once, before the model is loaded; each rank reads its share.

        Args:
            show_bar: Whether the first process shows a progress bar.
            warn: Takes what a reader of scores must know about labels and images.

        Raises:
            UserError: If some cannot be used; the message is the same on all ranks and names the files.
        """
        pairs: dict[str, ReadPair | str] = {}  # by SPLIT/NAME
        for split, dataset in self.splits.items():
            images = len(dataset)
            published = dataset.official_size or images
            if published != images:
                warn(f"{self.root}: {images:,} {split} images, but {published:,} were published")
            share = range(rank(), images, rank_count())
            name = f"{self.name} {split}"
            of_rank = read_pairs(
                dataset,
                name=name,
                indices=share,
                workers=self.num_workers,
                progress=show_bar and rank() == 0,
            )
            of_split = ChainMap(*all_gather_objects(of_rank))
            pairs |= {f"{split}/{name}": of_split[i] for i, name in enumerate(dataset.names)}
        check_pairs([pair for pair in pairs.values() if isinstance(pair, str)], len(pairs))
        for split, dataset in self.splits.items():
            of_split = [pairs[f"{split}/{name}"] for name in dataset.names]
            labels, contents, _ = zip(*of_split, strict=True)
            self.labels[split] = join_counts(labels)
            self.pixels += [counts.pixels for counts in labels]
            group_copies(dataset, contents)
        check_labels(self.classes, self.labels)
        self.remarks = find_remarks(pairs)
        for note in data_notes(self.classes, self.labels, self.remarks):
            warn(f"{self.root}: {note}")

    def read_images(
        self, images: Dataset, preprocess: Preprocess, prepare: MaskPreparer | None = None
    ) -> PreprocessedDataset:
        """Return images, or blank pictures in their place, as a model takes them."""
        if self.is_blank:
            preprocess = blanked(preprocess)
        return PreprocessedDataset(images, preprocess, prepare)

    @property
    def rank_batch_size(self) -> int:
        """Images per batch of a rank."""
        return math.ceil(self.batch_size / rank_count())

    def validation_loader(self, images: PreprocessedDataset | CachedFeatures) -> DataLoader:
        """Return the loader of the validation images that are this process's."""
        batches = validation_batches(
            len(images), batch_size=self.rank_batch_size, rank=rank(), world_size=rank_count()
        )
        return self.loader(images, batches)

    def loader(self, images: PreprocessedDataset | CachedFeatures, batches) -> DataLoader:
        """Return the loader of batches of images of a split: their indices, or a sampler of these."""
        is_cached = isinstance(images, CachedFeatures)
        return DataLoader(
            images,
            batch_sampler=batches,
            **worker_options(0 if is_cached else self.num_workers),
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )


def verify_data(options: VerifyOptions) -> None:
    """Run `probes verify-data`: read every image and target of both splits, and print what they contain.

    Raises:
        UserError: If some cannot be used, or no pixel of a split is labelled; the message names them.
    """
    workers = usable_cores() if options.workers is None else options.workers
    data = ProbeData(replace(options.data, num_workers=workers))
    data.verify(True, partial(print, "warning:"))
    print(format_labels(data.classes, data.labels))
    if options.preview:
        _write_preview(data, options.preview)
    sizes = ", ".join(f"{len(dataset):,} {split} images" for split, dataset in data.splits.items())
    targets = f"{data.num_classes} classes" if data.classes else data.task
    print(f"{data.root}: {sizes}, {targets}, all readable")


def _write_preview(data: ProbeData, file: Path) -> None:
    """Write the sheet of photos with their masks.

    Raises:
        UserError: The task has no classes.
    """
    if not data.classes:
        raise UserError(f"--preview shows classes; {data.task} has none")
    from .sheet import draw_sheet  # scipy is slow to import

    with atomic_write(file) as partial:
        draw_sheet(data.splits, data.pixels).save(partial, "PNG")
    print(f"look at {file}: do the masks fit?")
