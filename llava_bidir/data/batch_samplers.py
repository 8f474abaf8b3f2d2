"""LLaVA's two batch samplers: seeded, the same on every rank, and resumable in mid-epoch; the loader of their steps.

Each global batch is split into consecutive blocks, one per micro-batch and rank, as in LLaVA.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy import ndarray
from torch import Generator, Tensor
from torch.utils.data import DataLoader

from llava_bidir.common.errors import UserError


def random_batches(
    lengths: ndarray, batch_size: int, micro_batch_size: int, generator: Generator
) -> ndarray:
    """Return all indices in random order, int[batches, batch_size]; the first fill up the last batch (stage 1)."""
    order = _shuffle(np.arange(len(lengths)), generator)
    return _split_batches(order, batch_size, order)


def grouped_batches(
    lengths: ndarray, batch_size: int, micro_batch_size: int, generator: Generator
) -> ndarray:
    """Return global batches of one modality each, in micro-batches of similar length (LLaVA's stage 2).

    The samples of each modality are drawn at random into megabatches of one global batch. Each megabatch is sorted by
    length and distributed over micro-batches of about equal total length. The megabatches of both modalities are then
    shuffled. The remaining samples form the last batches, the only mixed ones. The longest batch comes first, so that
    running out of memory shows at once. Source: LLaVA llava_trainer.py get_modality_length_grouped_indices.

    Deviates: LLaVA does not move the longest batch to the front, and ends with the last megabatch of each modality even
    if it is full. With other numbers of samples, the other batches are LLaVA's for the same random numbers.

    Args:
        lengths: int[samples], words per sample, negative for text-only samples.
        batch_size: Samples per global batch.
        micro_batch_size: Samples per device and forward.
        generator: Source of all random choices.

    Returns:
        Indices, int[batches, batch_size].
    """
    megabatches = []
    leftover = []
    for text_only in (False, True):
        of_modality = np.flatnonzero((lengths < 0) == text_only)
        order = _shuffle(of_modality, generator)
        full = len(order) // batch_size * batch_size
        megabatches.append(order[:full].reshape(-1, batch_size))
        leftover.append(order[full:])
    megabatches = _balance_micro_batches(
        np.concatenate(megabatches), np.abs(lengths), micro_batch_size
    )
    megabatches = _shuffle(megabatches, generator)
    if len(megabatches):
        longest = np.abs(lengths)[megabatches].max(1).argmax()
        megabatches[[0, longest]] = megabatches[[longest, 0]]
    rest = np.sort(np.concatenate(leftover))
    fill = rest
    if len(megabatches):
        fill = megabatches[0]
    last = _split_batches(rest, batch_size, fill)
    return np.concatenate([megabatches, last])


def _shuffle(rows: ndarray, generator: Generator) -> ndarray:
    return rows[torch.randperm(len(rows), generator=generator).numpy()]


def _balance_micro_batches(megabatches: ndarray, words: ndarray, size: int) -> ndarray:
    """Assign the samples of each row, longest first, to the shortest micro-batch that is not full.

    The loop is vectorised over rows: one step assigns one sample per row.
    """
    count, width = megabatches.shape
    by_length = np.argsort(-words[megabatches], axis=1, kind="stable")
    megabatches = np.take_along_axis(megabatches, by_length, axis=1)
    rows = np.arange(count)
    total = np.zeros((count, width // size))
    filled = np.zeros((count, width // size), int)
    assigned = np.empty_like(megabatches)
    for samples in megabatches.T:
        shortest = total.argmin(1)
        position = filled[rows, shortest]
        assigned[rows, shortest * size + position] = samples
        total[rows, shortest] += np.where(position + 1 < size, words[samples], np.inf)
        filled[rows, shortest] += 1
    return assigned


def _split_batches(order: ndarray, size: int, fill: ndarray) -> ndarray:
    """Split `order` into batches and fill up the last one, since all ranks need the same number of samples."""
    missing = np.resize(fill, -len(order) % size)
    return np.concatenate([order, missing]).reshape(-1, size)


@dataclass(eq=False)
class BatchSampler:
    """Batch sampler with the micro-batches of one rank, which can start in mid-epoch.

    Args:
        lengths: Words per sample, negative for text-only samples, int[samples].
        global_batch_size: Samples per global batch, over all ranks and accumulated micro-batches.
        batch_size: Samples per device and forward. Lightning's DeepSpeedStrategy reads it.
        draw: :func:`random_batches` or :func:`grouped_batches`.
        rank: Rank of this process.
        world_size: Number of processes.
        seed: Decides the order together with the epoch; the same on every rank.
        epoch: Epoch of the next pass.
        start: Micro-batches that the next pass leaves out, since they were trained before an interruption.

    Raises:
        UserError: The global batch cannot be divided into micro-batches over the ranks.
    """

    lengths: ndarray
    global_batch_size: int
    batch_size: int
    draw: Callable[..., ndarray] = random_batches
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    epoch: int = 0
    start: int = 0

    def __post_init__(self):
        if self.global_batch_size % (self.batch_size * self.world_size):
            raise UserError(
                f"data.batch_size {self.global_batch_size} is not a multiple of data.micro_batch_size "
                f"{self.batch_size} x {self.world_size} devices; change one of them"
            )
        self.sampler = self  # Lightning calls set_epoch on a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        batches = math.ceil(len(self.lengths) / self.global_batch_size)
        return batches * self.global_batch_size // (self.batch_size * self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        self.start = 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = self.draw(
            self.lengths,
            batch_size=self.global_batch_size,
            micro_batch_size=self.batch_size,
            generator=generator,
        )
        micro_batches = batches.reshape(-1, self.batch_size)[self.rank :: self.world_size]
        yield from micro_batches[start:].tolist()


class StepLoader(DataLoader):
    """A `DataLoader` that prefetches the micro-batches of an optimizer step and adds a `weight` to each.

    The weight is the number of supervised tokens divided by its mean over all micro-batches of the step on all ranks.
    Lightning, DDP and DeepSpeed average the loss over micro-batches and ranks. With this weight, the average of
    per-micro-batch means is the mean over all supervised tokens of the step. The weight is applied before the backward
    pass, so gradients need no rescaling afterwards, also under ZeRO. With two micro-batches of 30 and 10 tokens::

        weights 1.5 and 0.5:  (1.5 * sum_30 / 30 + 0.5 * sum_10 / 10) / 2  ==  (sum_30 + sum_10) / 40

    Args:
        step_batches: Micro-batches per step on this rank; the loader's length is a multiple of it.
        mean_over_ranks: Averages a scalar over all ranks; every rank calls it once per step.
    """

    def __init__(
        self, *args, step_batches: int, mean_over_ranks: Callable[[Tensor], Tensor], **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.step_batches = step_batches
        self.mean_over_ranks = mean_over_ranks

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        while step := list(islice(batches, self.step_batches)):
            supervised = torch.tensor([float(batch["supervised"]) for batch in step])
            mean = self.mean_over_ranks(supervised.mean()).clamp(min=1e-9)
            for batch in step:
                yield {**batch, "weight": batch["supervised"] / mean}
