"""Scores of a dataset, of its resamplings, and of two conditions with images exchanged.

Shapes: R resamplings, N images, S sites, M sums per image of a task.
"""

import torch
from torch import Tensor

from probes.tasks import Task


def dataset_scores(task: Task, sums: Tensor) -> dict[str, Tensor]:
    """Return the scores f64[S] of a task by name on the dataset, from sums f[S, N, M]."""
    return task.dataset_scores(sums.double().sum(1))


def resampled_scores(task: Task, sums: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the scores f64[R, S] of a task by name for weights f[R, N]."""
    return task.dataset_scores(torch.einsum("rn,snm->rsm", weights.double(), sums.double()))


def swapped_scores(
    task: Task,
    a: Tensor,
    b: Tensor,
    swaps: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the scores f64[R, S] of two conditions on the same images after they exchange some of their images.

    Args:
        task: The task.
        a: Sums f[S, N, M] of the first condition.
        b: Sums of the second condition on the same images and sites.
        swaps: f[R, N] of 0 and 1, see :func:`llava_bidir.common.bootstrap.random_swaps`.
    """
    a = a.double()
    b = b.double()
    moved = torch.einsum("rn,snm->rsm", swaps.double(), b - a)
    return task.dataset_scores(a.sum(1) + moved), task.dataset_scores(b.sum(1) - moved)
