"""Which samples make a batch: LLaVA's two ways, seeded, the same on every rank, and resumable in mid-epoch.

Each global batch is drawn as a whole and cut into one consecutive block for each rank and micro-batch, as LLaVA's is.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy import ndarray
from torch import Generator

from llava_bidir.common.errors import UserError


def random_batches(lengths: ndarray, batch_size: int, micro_batch_size: int, generator: Generator) -> ndarray:
    """int[batches, batch_size]: all indices in random order; the last batch is topped up from the first (LLaVA's
    stage 1)."""
    return _batches(_shuffled(np.arange(len(lengths)), generator), batch_size)


def grouped_batches(lengths: ndarray, batch_size: int, micro_batch_size: int, generator: Generator) -> ndarray:
    """int[batches, batch_size]: global batches of one modality each and of similar lengths within (LLaVA's stage 2).

    Of each modality, random megabatches of one global batch are sorted by length and dealt to micro-batches of about
    equal total length; then the megabatches of both modalities are shuffled. What is left over of either modality
    makes up the last batches, the only mixed ones. The longest batch comes first, so that running out of memory shows
    at once. Source: LLaVA llava_trainer.py get_modality_length_grouped_indices.

    Args:
        lengths: int[samples], words of each sample, negative for text only.
        batch_size: Samples of a global batch.
        micro_batch_size: Samples that one device holds at a time.
        generator: Draws all random choices.
    """
    megabatches, rest = [], []
    for text_only in (False, True):
        order = _shuffled(np.flatnonzero((lengths < 0) == text_only), generator)
        full = len(order) // batch_size * batch_size
        megabatches.append(order[:full].reshape(-1, batch_size))
        rest.append(order[full:])
    megabatches = _shuffled(
        _even_micro_batches(np.concatenate(megabatches), np.abs(lengths), micro_batch_size), generator
    )
    if len(megabatches):
        longest = np.abs(lengths)[megabatches].max(1).argmax()
        megabatches[[0, longest]] = megabatches[[longest, 0]]
    rest = _batches(np.sort(np.concatenate(rest)), batch_size, fill=megabatches[:1].ravel())
    return np.concatenate([megabatches, rest])


def _shuffled(rows: ndarray, generator: Generator) -> ndarray:
    return rows[torch.randperm(len(rows), generator=generator).numpy()]


def _even_micro_batches(megabatches: ndarray, words: ndarray, size: int) -> ndarray:
    """Deals each row, longest first, each sample to the micro-batch that is shortest so far and not full.

    All rows at once: one step deals one sample of each.
    """
    count, width = megabatches.shape
    by_length = np.argsort(-words[megabatches], axis=1, kind="stable")
    megabatches = np.take_along_axis(megabatches, by_length, axis=1)
    rows = np.arange(count)
    total, filled = np.zeros((count, width // size)), np.zeros((count, width // size), int)
    dealt = np.empty_like(megabatches)
    for samples in megabatches.T:
        lightest = total.argmin(1)
        place = filled[rows, lightest]
        dealt[rows, lightest * size + place] = samples
        total[rows, lightest] += np.where(place + 1 < size, words[samples], np.inf)
        filled[rows, lightest] += 1
    return dealt


def _batches(order: ndarray, size: int, fill: ndarray | None = None) -> ndarray:
    """Cuts `order` into batches; the last one is filled up, for every rank needs as many samples as the others."""
    missing = -len(order) % size
    source = order if fill is None or not len(fill) else fill
    return np.concatenate([order, np.resize(source, missing)]).reshape(-1, size)


class BatchSampler:
    """Micro-batches of one rank: a batch sampler for `DataLoader` that can start in mid-epoch.

    Args:
        lengths: Words of each sample, negative for text only.
        batch_size: Samples of a global batch, over all ranks and accumulated micro-batches.
        micro_batch_size: Samples that one device holds at a time.
        grouped: :func:`grouped_batches` instead of :func:`random_batches`.
        rank, world_size: This process among all.
        seed: With the epoch, decides the order; the same on every rank.

    Raises:
        UserError: The global batch does not divide into micro-batches over the ranks.
    """

    def __init__(
        self,
        lengths: ndarray | list[int],
        batch_size: int,
        micro_batch_size: int,
        *,
        grouped: bool = False,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ):
        if batch_size % (micro_batch_size * world_size):
            raise UserError(
                f"data.batch_size {batch_size} is not a multiple of data.micro_batch_size {micro_batch_size} x "
                f"{world_size} devices; change one of them, or the global batch would differ from what the config says"
            )
        if not len(lengths):
            raise UserError("data.annotations holds no record")
        self.lengths = np.asarray(lengths, np.int32)
        self.global_batch_size, self.batch_size = batch_size, micro_batch_size
        self.draw = grouped_batches if grouped else random_batches
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.start = 0, 0
        self.sampler = self  # Lightning calls set_epoch on a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, micro_batches: int) -> None:
        """Leaves out the first micro-batches of the next pass, those trained before an interruption."""
        self.start = micro_batches

    def __len__(self) -> int:
        batches = math.ceil(len(self.lengths) / self.global_batch_size)
        return batches * self.global_batch_size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = self.draw(self.lengths, self.global_batch_size, self.batch_size, generator)
        mine = batches.reshape(-1, self.batch_size)[self.rank :: self.world_size]
        for micro_batch in mine[start:]:
            yield micro_batch.tolist()
