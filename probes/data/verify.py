"""Read every image and target before a model is loaded, to find bad files in seconds instead of after GPU hours."""

from collections import Counter
from collections.abc import Iterable

import torch
from numpy import ndarray
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.processes import worker_options

from .base import IGNORE_INDEX, BadFile, ImageDataset
from .label_counts import count_labels

BATCH_SIZE = 16
FILES_PER_KIND = 3  # in the error message
UNLABELLED = "no labelled pixel in any {} of {}"  # target, split


class _PairDefects(Dataset):
    """The defect (kind, message) of each pair, or None, and its labels; pairs are decoded as in training."""

    def __init__(self, dataset: ImageDataset, name: str):
        self.dataset = dataset
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[tuple[str, str] | None, ndarray | None]:
        try:
            target = self.dataset[index]["target"]
        except BadFile as error:
            return (error.kind, str(error)), None
        return self._defect(index, target), count_labels(target, len(self.dataset.classes))

    def _defect(self, index: int, target: ndarray) -> tuple[str, str] | None:
        if not self.dataset.classes:
            return None
        kind = UNLABELLED.format(self.dataset.target_name, self.name)
        file = self.dataset.files(index)[-1]
        if (target == IGNORE_INDEX).all():
            return kind, f"{file}: all pixels are ignored; check which labels are"
        if self.dataset.task == "boundaries" and not (target == 1).any():
            return (
                kind,
                f"{file}: no pixel is a boundary; where objects have an ignored border, as in VOC, none can be",
            )
        return None


def find_bad_files(
    dataset: ImageDataset,
    name: str,
    indices: Iterable[int],
    workers: int,
    progress: bool = True,
    counts: list[ndarray] | None = None,
) -> list[tuple[str, str]]:
    """Return (kind, message) of each pair that cannot be used, also of targets without a labelled pixel.

    Args:
        dataset: A split.
        name: Name of the split, for messages and the progress bar.
        indices: The pairs to read.
        workers: Processes; with 0, or for few images, the pairs are read in this process.
        progress: Show a progress bar.
        counts: Takes the labels of each image that can be read, see :func:`count_labels`.
    """
    indices = list(indices)
    few = len(indices) <= 4 * BATCH_SIZE  # reading them takes less time than starting a process
    loader = DataLoader(
        _PairDefects(dataset, name),
        batch_size=BATCH_SIZE,
        sampler=indices,
        collate_fn=list,
        **worker_options(0 if few else workers),
        # the loader draws a seed, which must not advance the generator of the run
        generator=torch.Generator(),
    )
    defects: list[tuple[str, str]] = []
    with tqdm(
        total=len(indices),
        desc=f"checking {name}",
        unit=" images",
        mininterval=1,
        disable=not progress,
    ) as bar:
        for results in loader:
            bar.update(len(results))
            defects += [defect for defect, _ in results if defect]
            if counts is not None:
                counts += [labels for _, labels in results if labels is not None]
    return defects


def leave_out_unlabelled(
    bad_files: list[tuple[str, str]], splits: dict[str, ImageDataset]
) -> list[tuple[str, str]]:
    """Return the bad files without unlabelled targets, unless all of a split are; `splits` by name."""
    found = Counter(kind for kind, _ in bad_files)
    images = {
        UNLABELLED.format(dataset.target_name, name): len(dataset)
        for name, dataset in splits.items()
    }
    return [
        (kind, message)
        for kind, message in bad_files
        if found[kind] == images.get(kind, found[kind])
    ]


def format_bad_files(bad_files: list[tuple[str, str]], images: int) -> str:
    """Return a summary: the number of files per kind of defect, and the first messages of each."""
    by_kind: dict[str, list[str]] = {}
    for kind, message in bad_files:
        by_kind.setdefault(kind, []).append(message)
    lines = [f"{len(bad_files)} of {images} images cannot be used:"]
    for kind, messages in by_kind.items():
        lines.append(f"  {len(messages)} x {kind}")
        lines += [f"    {message}" for message in sorted(messages)[:FILES_PER_KIND]]
        if len(messages) > FILES_PER_KIND:
            lines += [f"    ... and {len(messages) - FILES_PER_KIND} more"]
    return "\n".join(lines)
