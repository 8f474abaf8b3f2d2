"""Reads every image and mask before a model is loaded: what is wrong shows in seconds, not after hours of GPU time."""

from collections.abc import Iterable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .base import BadFile, SegmentationDataset

PAIRS_AT_ONCE = 16
SHOWN = 3  # files of a kind that the error names

Findings = list[tuple[str, str]]


class Checks(Dataset):
    """What is wrong with each pair, (kind, message), or None: decoded as training decodes it."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[str, str] | None:
        try:
            self.dataset[index]
        except BadFile as error:
            return error.kind, str(error)
        return None


def find_bad_files(
    dataset: SegmentationDataset, name: str, indices: Iterable[int], workers: int, progress: bool = True
) -> Findings:
    """(kind, message) of every pair that cannot be used.

    Args:
        dataset: A split.
        name: For the progress bar.
        indices: Which pairs to look at.
        workers: Processes; with 0, or for a handful of images, this one.
        progress: Shows a bar.
    """
    indices = list(indices)
    few = len(indices) <= 4 * PAIRS_AT_ONCE  # read in the time that a process takes to start
    loader = DataLoader(
        Checks(dataset),
        batch_size=PAIRS_AT_ONCE,
        sampler=indices,
        collate_fn=list,
        num_workers=0 if few else workers,
        generator=torch.Generator(),  # a loader draws a seed; not from the run's random numbers
    )
    with tqdm(total=len(indices), desc=f"checking {name}", unit=" images", mininterval=1, disable=not progress) as bar:
        return list(_found(loader, bar))


def _found(loader: DataLoader, bar: tqdm) -> Iterator[tuple[str, str]]:
    for results in loader:
        bar.update(len(results))
        yield from filter(None, results)


def report(findings: Findings, images: int) -> str:
    """How many files of each kind, and the first of them."""
    by_kind: dict[str, list[str]] = {}
    for kind, message in findings:
        by_kind.setdefault(kind, []).append(message)
    lines = [f"{len(findings)} of {images} images cannot be used:"]
    for kind, messages in by_kind.items():
        lines.append(f"  {len(messages)} x {kind}")
        lines += [f"    {message}" for message in sorted(messages)[:SHOWN]]
        lines += [f"    ... and {len(messages) - SHOWN} more"] if len(messages) > SHOWN else []
    return "\n".join(lines)
