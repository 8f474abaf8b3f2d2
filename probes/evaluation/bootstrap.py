"""Scores of a dataset, of its resamplings, and of two conditions with images exchanged.

Shapes: R resamplings, N images, K classes, S sites, M sums per image of another task than segmentation.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probes.tasks import Task

from .metrics import Counts, Scores, scores

if TYPE_CHECKING:  # it imports torchmetrics
    from .image_metrics import TaskSums


def dataset_scores(counts: Counts) -> Scores:
    """Return the scores of every site on the dataset: miou and pacc f[S], iou f[S, K]."""
    return scores(counts.intersection.sum(1), counts.predicted.sum(1), counts.labelled.sum(0))


def resampled_scores(counts: Counts, weights: Tensor) -> Scores:
    """Return the scores of every site for weights f[R, N]: miou and pacc f[R, S], iou f[R, S, K]."""
    weights = weights.double()

    def total(x):
        return torch.einsum("rn,snk->rsk", weights, x.double())

    return scores(
        total(counts.intersection),
        total(counts.predicted),
        (weights @ counts.labelled.double())[:, None],
    )


def swapped_scores(a: Counts, b: Counts, swaps: Tensor) -> tuple[Scores, Scores]:
    """Return the scores f[R, S] of two conditions on the same images after they exchange some of their images.

    Args:
        a: Counts of the first condition.
        b: Counts of the second condition on the same images and sites.
        swaps: f[R, N] of 0 and 1, see :func:`llava_bidir.common.bootstrap.random_swaps`.
    """
    swaps = swaps.double()
    labelled = a.labelled.sum(0)
    sums = []
    for x, y in ((a.intersection, b.intersection), (a.predicted, b.predicted)):
        x = x.double()
        y = y.double()
        moved = torch.einsum("rn,snk->rsk", swaps, y - x)
        sums.append((x.sum(1) + moved, y.sum(1) - moved))
    (a_right, b_right), (a_predicted, b_predicted) = sums
    return scores(a_right, a_predicted, labelled), scores(b_right, b_predicted, labelled)


def probe_scores(task: Task | None, counts: "Counts | TaskSums") -> dict[str, Tensor]:
    """Return the scores f64[S] of every site by name, the main one first; `task` is None for segmentation."""
    if task:
        return task_scores(task, counts.sums)
    miou, pacc, _ = dataset_scores(counts)
    return {"miou": miou, "pacc": pacc}


def task_scores(task: Task, sums: Tensor) -> dict[str, Tensor]:
    """Return the scores f64[S] of a task by name on the dataset, from sums f[S, N, M]."""
    return task.dataset_scores(sums.double().sum(1))


def resampled_task_scores(task: Task, sums: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return the scores f64[R, S] of a task by name for weights f[R, N]."""
    return task.dataset_scores(torch.einsum("rn,snm->rsm", weights.double(), sums.double()))
