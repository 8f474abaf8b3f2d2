"""Which samples make a batch: LLaVA's two ways, seeded, the same on every rank, and resumable in mid-epoch.

Each global batch is drawn as a whole and cut into one consecutive block for each rank and micro-batch, as LLaVA's is.
"""

from collections.abc import Iterator

import torch
from torch import Generator


def random_batches(lengths: list[int], batch_size: int, micro_batch_size: int, generator: Generator) -> list[list[int]]:
    """All indices in random order, in global batches; the last one is topped up from the first (LLaVA's stage 1)."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    return _batches(order, batch_size)


def grouped_batches(
    lengths: list[int], batch_size: int, micro_batch_size: int, generator: Generator
) -> list[list[int]]:
    """Global batches of one modality each and of similar lengths within (LLaVA's stage 2).

    Of each modality, random megabatches of one global batch are sorted by length and dealt to micro-batches of about
    equal total length; then the megabatches of both modalities are shuffled. What is left over of either modality
    makes up the last batches, the only mixed ones. The longest batch comes first, so that running out of memory shows
    at once. Source: LLaVA llava_trainer.py get_modality_length_grouped_indices.

    Args:
        lengths: Words of each sample, negative for text only.
        batch_size: Samples of a global batch.
        micro_batch_size: Samples that one device holds at a time.
        generator: Draws all random choices.
    """
    megabatches, rest = [], []
    for text_only in (False, True):
        indices = [i for i, n in enumerate(lengths) if (n < 0) == text_only]
        order = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        if chunks and len(chunks[-1]) < batch_size:
            rest += chunks.pop()
        megabatches += [_even_micro_batches(chunk, lengths, micro_batch_size) for chunk in chunks]
    megabatches = [megabatches[i] for i in torch.randperm(len(megabatches), generator=generator).tolist()]
    if megabatches:
        longest = max(range(len(megabatches)), key=lambda i: max(abs(lengths[j]) for j in megabatches[i]))
        megabatches[0], megabatches[longest] = megabatches[longest], megabatches[0]
    return megabatches + _batches(sorted(rest), batch_size, fill=megabatches[0] if megabatches else None)


def _even_micro_batches(indices: list[int], lengths: list[int], size: int) -> list[int]:
    """Deals `indices`, longest first, each to the micro-batch that is shortest so far and not full."""
    micro = [[] for _ in range(len(indices) // size)]
    total = [0.0] * len(micro)
    for index in sorted(indices, key=lambda i: -abs(lengths[i])):
        lightest = min(range(len(micro)), key=total.__getitem__)
        micro[lightest].append(index)
        total[lightest] = total[lightest] + abs(lengths[index]) if len(micro[lightest]) < size else float("inf")
    return [index for batch in micro for index in batch]


def _batches(order: list[int], size: int, fill: list[int] | None = None) -> list[list[int]]:
    """Cuts `order` into batches; the last one is filled up, for every rank needs as many samples as the others."""
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    if batches and len(batches[-1]) < size:
        source = fill or order
        missing = size - len(batches[-1])
        batches[-1] = batches[-1] + (source * (missing // len(source) + 1))[:missing]
    return batches


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
        ValueError: The global batch does not divide into micro-batches over the ranks.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        micro_batch_size: int,
        *,
        grouped: bool = False,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ):
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"data.batch_size {batch_size} is not a multiple of data.micro_batch_size {micro_batch_size} x "
                f"{world_size} devices; change one of them, or the global batch would differ from what the config says"
            )
        if not lengths:
            raise ValueError("data.annotations holds no record")
        self.lengths, self.global_batch_size, self.batch_size = lengths, batch_size, micro_batch_size
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
        return len(self._epoch_batches())

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        yield from self._epoch_batches()[start:]

    def _epoch_batches(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        batches = self.draw(self.lengths, self.global_batch_size, self.batch_size, generator)
        micro = [batch[i : i + self.batch_size] for batch in batches for i in range(0, len(batch), self.batch_size)]
        return micro[self.rank :: self.world_size]
