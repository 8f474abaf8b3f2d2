"""Accuracy by patch of two runs on the same images, and the gap between them: bidirectional minus causal.

Shapes: N images, T patches, R resamplings.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import interval
from llava_bidir.common.errors import UserError
from probes.runs.probe_run import ProbeRun


class PatchCounts(NamedTuple):
    """Correctly predicted and labelled pixels by image and patch, f[N, T] each."""

    right: Tensor
    valid: Tensor

    def pool(self, *groups: Sequence[int]) -> "PatchCounts":
        """Return the sums over G groups of patches, f[N, G]."""

        def sum_groups(counts: Tensor) -> Tensor:
            sums = [counts[:, list(patches)].sum(1) for patches in groups]
            return torch.stack(sums, 1)

        return PatchCounts(sum_groups(self.right), sum_groups(self.valid))


CountsByMask = dict[str, PatchCounts]  # keys "causal" and "bidirectional"


def patch_counts(run: ProbeRun, site: str) -> PatchCounts:
    """Return the counts of a finished run at one site.

    Raises:
        UserError: The run has no such site.
    """
    if site not in run.sites:
        raise UserError(f"{run.path} has no site {site!r}; it has {', '.join(run.sites)}")
    right = run.counts.patch_right[run.sites.index(site)]
    return PatchCounts(right.double(), run.counts.patch_valid.double())


def patch_accuracy(
    counts: CountsByMask, weights: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return accuracy by patch, f[T], and under each resampling `weights` f[R, N], f[R, T]; both by mask."""
    accuracy = {}
    resampled = {}
    for mask, (right, valid) in counts.items():
        accuracy[mask] = right.sum(0) / valid.sum(0)
        resampled[mask] = (weights @ right) / (weights @ valid)
    return accuracy, resampled


def accuracy_gap(accuracy: dict[str, Tensor], resampled: dict[str, Tensor]) -> dict[str, list]:
    """Return {"causal", "bidirectional", "gap": [T], "gap_ci95": [[lo, hi]]} from the results of `patch_accuracy`."""
    gap = accuracy["bidirectional"] - accuracy["causal"]
    resampled_gap = resampled["bidirectional"] - resampled["causal"]
    return {
        **{mask: values.tolist() for mask, values in accuracy.items()},
        "gap": gap.tolist(),
        "gap_ci95": [interval(g, resampled_gap[:, i]) for i, g in enumerate(gap.tolist())],
    }


def pooled_gap(
    counts: CountsByMask, weights: Tensor, patches: Sequence[int]
) -> dict[str, float | list[float]]:
    """Return the same for some patches pooled, with one number per key."""
    pooled = {mask: pixels.pool(patches) for mask, pixels in counts.items()}
    accuracy, resampled = patch_accuracy(pooled, weights)
    gap = accuracy_gap(accuracy, resampled)
    return {key: values[0] for key, values in gap.items()}
