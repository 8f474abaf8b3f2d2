"""Data loader that weights each micro-batch by its supervised tokens."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader


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
        self,
        *args,
        step_batches: int,
        mean_over_ranks: Callable[[Tensor], Tensor],
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.step_batches = step_batches
        self.mean_over_ranks = mean_over_ranks

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        while step := list(islice(batches, self.step_batches)):
            mean = self.mean_over_ranks(
                torch.tensor([float(batch["supervised"]) for batch in step]).mean()
            )
            for batch in step:
                yield {**batch, "weight": batch["supervised"] / mean.clamp(min=1e-9)}
