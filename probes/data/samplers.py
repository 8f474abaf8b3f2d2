"""Batch samplers with the same global batches on any number of ranks, resumable within an epoch.

Legend: N images, R ranks. A global batch is the set of images of one optimizer step over all ranks.
"""

import math
from collections.abc import Hashable, Iterator, Sequence

import torch

from llava_bidir.common.errors import UserError

PAD_INDEX = -1  # index of a fully ignored image, for a rank without an image in the last batch


class TrainingBatches:
    """Batch sampler of one rank, with a new order per epoch, that can start within an epoch.

    Rank r gets every R-th image of each global batch, from image r. If the last batch has fewer images than ranks, the
    other ranks get `PAD_INDEX`, because all ranks must take part in each step. Eight images, batches of three, two
    ranks::

        order 5 2 7 0 1 3 4 6:   rank 0 gets [5, 7] [0, 3] [4],   rank 1 gets [2] [1] [6]

    Args:
        images: N.
        batch_size: Images per global batch.
        rank: Index of this process.
        world_size: R.
        seed: Seed of the order, together with the epoch; the same on every rank.
        are_random: Image i of epoch e has the index e N + i, because it is drawn anew each time.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        are_random: bool = False,
    ):
        self.images = images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.are_random = are_random
        self.epoch = 0
        self.start = 0
        self.sampler = self  # Lightning calls set_epoch on a batch sampler's `sampler`

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Skip the first batches of the next pass, which were trained before an interruption."""
        self.start = batches

    def __len__(self) -> int:
        return math.ceil(self.images / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        start = self.start
        self.start = 0
        # no pass of a seed has the order of a pass of another one
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(self.images, generator=generator)
        if self.are_random:
            order += self.epoch * self.images
        order = order.tolist()
        for i in range(start, len(self)):
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield batch[self.rank :: self.world_size] or [PAD_INDEX]


def validation_batches(
    images: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Return the batches of one rank; all ranks together have each image once.

    Every rank has the same number of batches, none empty, because DDP synchronises buffers in each forward. If R does
    not divide N, some ranks have one more image in their last batch. Five images one at a time on two ranks::

        rank 0 gets [0] [2, 4],   rank 1 gets [1] [3]

    Args:
        images: N.
        batch_size: Images per batch of a rank.
        rank: Index of this process.
        world_size: R.

    Raises:
        UserError: If there are more ranks than images.
    """
    if images < world_size:
        raise UserError(f"{images} validation images for {world_size} devices; use fewer devices")
    mine = list(range(rank, images, world_size))
    starts = range(0, images // world_size, batch_size)
    ends = [*starts[1:], len(mine)]
    return [mine[start:end] for start, end in zip(starts, ends, strict=True)]


def assign_folds(groups: Sequence[Hashable], folds: int) -> torch.Tensor:
    """Return the fold of each image, i64[N], from its group; images of a group share a fold.

    Blocks of up to eight images, or groups, in the order of the dataset are dealt out in turns. Neighbours in that
    order are often frames of a video or photos of a place: in different folds, each would tell what the other one
    shows, and too weak a regularisation would look best. Longer blocks would leave out complete kinds of scenes where
    a dataset is sorted by them, as ADE20K is.

    Raises:
        UserError: If there are fewer images or groups than folds.
    """
    units = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    if len(units) < folds:
        raise UserError(
            f"{len(units)} training images, or groups of these, for {folds} folds; expected one for each at least "
            "(--folds)"
        )
    block = max(1, min(8, len(units) // (5 * folds)))
    fold_of_unit = torch.arange(len(units)) // block % folds
    return fold_of_unit[[units[group] for group in groups]]
