"""Scores of a dataset and of its resamplings.

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
