"""Scores of probes on the validation split: the same for probes that are trained and that are solved."""

from typing import Any

from torch import Tensor

from probes.data.batches import group_by_size
from probes.score.image_metrics import TaskMetric
from probes.site_probes import SiteProbes


def score_batch(
    probes: SiteProbes,
    states: dict[str, Tensor],
    batch: dict[str, Any],
    metric: TaskMetric,
) -> Tensor:
    """Count the images of a batch; return the logits f[S, B, K, h, w].

    Args:
        probes: The probes.
        states: f[B, T, d] by site.
        batch: Targets, and the index of each image.
        metric: Receives the counts.
    """
    logits = probes.logits(states)
    for images, target in group_by_size(batch["target"]):
        metric.update(logits[:, images], target, batch["index"][images])
    return logits


def compute_counts(metric: TaskMetric) -> dict[str, Tensor]:
    """Return what the task counts of each image, by name, on the CPU; the metric is empty then."""
    counted = metric.compute()
    metric.reset()
    return counted
