"""Which images make a batch: the same global batches on any number of ranks, and resumable in mid-epoch.

Shapes: N images, R ranks; a global batch is what one optimizer step sees on all ranks together.
"""

import math
from collections.abc import Iterator

import torch

from llava_bidir.common.errors import UserError

PAD_INDEX = -1  # stands for an image without a labelled pixel, where the last batch has none for a rank


class TrainingBatches:
    """Batches of one rank, in a new order each epoch: a batch sampler for `DataLoader` that can start in mid-epoch.

    Every R-th image of each global batch is a rank's. Where the last batch has fewer images than there are ranks, those
    without one get `NOTHING`, for all have to take part in each step. Eight images, batches of three, two ranks::

        order 5 2 7 0 1 3 4 6:   rank 0 gets [5, 7] [0, 3] [4],   rank 1 gets [2] [1] [6]

    Args:
        images: N.
        batch_size: Images of a global batch.
        rank, world_size: This process among all.
        seed: With the epoch, decides the order; the same on every rank.
    """

    def __init__(self, images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.images, self.batch_size = images, batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.start = 0, 0
        self.sampler = self  # Lightning calls set_epoch on a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Leaves out the first batches of the next pass, those trained before an interruption."""
        self.start = batches

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        order = torch.randperm(self.images, generator=torch.Generator().manual_seed(self.seed + self.epoch)).tolist()
        for i in range(start, len(self)):
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield batch[self.rank :: self.world_size] or [PAD_INDEX]


def validation_batches(images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """The batches of one rank; over all ranks each image once.

    Every rank has as many batches as the others, none empty, since DDP exchanges buffers in each forward; where N does
    not divide by R, some ranks have one image more, in their last batch. Five images one at a time on two ranks::

        rank 0 gets [0] [2, 4],   rank 1 gets [1] [3]

    Args:
        images: N.
        batch_size: Images of a rank's batch.
        rank, world_size: This process among all.

    Raises:
        UserError: There are more ranks than images.
    """
    if images < world_size:
        raise UserError(f"{images} validation images for {world_size} devices; use fewer devices")
    mine = list(range(rank, images, world_size))
    starts = range(0, images // world_size, batch_size)
    ends = [*starts[1:], len(mine)]
    return [mine[start:end] for start, end in zip(starts, ends, strict=True)]
