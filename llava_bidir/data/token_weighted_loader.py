"""Micro-batches that know their weight in the optimizer step they belong to."""

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader


class StepLoader(DataLoader):
    """A `DataLoader` that reads the micro-batches of one optimizer step ahead and gives each its `weight`.

    The weight is its number of supervised tokens over the mean of all micro-batches of the step, on all ranks. A mean
    loss per micro-batch times its weight, averaged over micro-batches and ranks as Lightning, DDP and DeepSpeed do, is
    the mean over all supervised tokens of the step. It is known before the backward pass, so that gradients have their
    final size at once, also where a strategy keeps them to itself (ZeRO). With two micro-batches of 30 and 10 tokens::

        weights 1.5 and 0.5:  (1.5 * sum_30 / 30 + 0.5 * sum_10 / 10) / 2  ==  (sum_30 + sum_10) / 40

    Args:
        step_batches: Micro-batches of a step on this rank; the loader's length is a multiple of it.
        mean_over_ranks: Averages a scalar over all ranks; every rank calls it once a step.
    """

    def __init__(self, *args, step_batches: int, mean_over_ranks: Callable[[Tensor], Tensor], **kwargs):
        super().__init__(*args, **kwargs)
        self.step_batches, self.mean_over_ranks = step_batches, mean_over_ranks

    def __iter__(self) -> Iterator[dict]:
        batches = super().__iter__()
        while step := list(islice(batches, self.step_batches)):
            mean = self.mean_over_ranks(torch.tensor([float(batch["supervised"]) for batch in step]).mean())
            for batch in step:
                yield {**batch, "weight": batch["supervised"] / mean.clamp(min=1e-9)}
