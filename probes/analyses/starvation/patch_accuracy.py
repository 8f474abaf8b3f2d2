"""Accuracy by patch of two runs on the same images, and the gap between them.

Shapes: N images, T patches, R resamplings.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from llava_bidir.common.bootstrap import interval
from llava_bidir.common.errors import UserError
from probes.results.probe_run import ProbeRun


class PatchCounts(NamedTuple):
    """Rightly predicted and labelled pixels by image and patch, f[N, T] each."""

    right: Tensor
    valid: Tensor

    def over(self, patches: Sequence[int]) -> "PatchCounts":
        """Some patches taken together, f[N, 1]."""
        return PatchCounts(*(x[:, list(patches)].sum(1, keepdim=True) for x in self))


Pair = dict[str, PatchCounts]  # "causal" and "bidirectional"


def patch_counts(run: ProbeRun, site: str) -> PatchCounts:
    """Of a finished run at one site.

    Raises:
        UserError: The run has no such site.
    """
    if site not in run.sites:
        raise UserError(f"{run.path} has no site {site!r}; it has {', '.join(run.sites)}")
    return PatchCounts(run.counts.patch_right[run.sites.index(site)].double(), run.counts.patch_valid.double())


def accuracies(counts: Pair, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Accuracy by patch, f[T], and under each resampling `weights` f[R, N], f[R, T]; both by mask."""
    return (
        {mask: right.sum(0) / valid.sum(0) for mask, (right, valid) in counts.items()},
        {mask: (weights @ right) / (weights @ valid) for mask, (right, valid) in counts.items()},
    )


def gap_of(accuracy: dict[str, Tensor], drawn: dict[str, Tensor]) -> dict[str, list]:
    """{"causal", "bidirectional", "gap": [T], "gap_ci95": [[lo, hi]]} from what :func:`accuracies` gives."""
    gap, drawn_gap = (x["bidirectional"] - x["causal"] for x in (accuracy, drawn))
    return {
        **{mask: values.tolist() for mask, values in accuracy.items()},
        "gap": gap.tolist(),
        "gap_ci95": [interval(g, drawn_gap[:, i]) for i, g in enumerate(gap.tolist())],
    }


def gap_over(counts: Pair, weights: Tensor, patches: Sequence[int]) -> dict[str, float | list[float]]:
    """The same of some patches taken together, a number each."""
    together = {mask: pixels.over(patches) for mask, pixels in counts.items()}
    return {key: values[0] for key, values in gap_of(*accuracies(together, weights)).items()}
