"""Accuracy by patch of two runs on the same images, and the gap between them: bidirectional minus causal.

The difference cancels effects of content that both masks share: early patches are mostly sky and ceiling. One mask may
still be better at these classes. So accuracy is also standardised to the same mix of classes at every patch: that on
each class, weighted by the class's share of the split's labelled pixels (direct standardisation). A class that never
occurs at a patch is left out there, for both masks. The class of a patch is that of most of its labelled pixels.

Shapes: N images, T patches, K classes, R resamplings.
"""

from typing import Any

import torch
from torch import Tensor

from probes.runs.compare import check_pair
from probes.runs.read import ProbeRun
from probes.score.estimate import Estimate

FIRST_PATCHES = 50  # as in Fig. 7; standardisation takes K products of R x N and N x T


def starvation(causal: ProbeRun, bidirectional: ProbeRun) -> dict[str, Any] | None:
    """Return the gap at the causal run's best layer; None if it has no layers, or the other run lacks this one.

    Returns:
        {"site", "grid", "images", "untrained", "causal", "bidirectional", "gap": [T], "gap_ci95": [[low, high]],
        "first_row": the same of the first row's patches together, "by_class": all of these, standardised, of the first
        50 patches}. A patch without labelled pixels has NaN.

    Raises:
        UserError: The runs differ in images, control or how probes were made.
    """
    check_pair(causal, bidirectional)
    site = causal.peak_layer
    if site is None or site not in bidirectional.sites:
        return None
    runs = (causal, bidirectional)
    right = {run.mask: run.counts.patch_right[run.sites.index(site)] for run in runs}
    valid = causal.counts.patch_valid
    once = torch.ones_like(causal.weights[:1])
    weights = torch.cat([once, causal.weights]).double()
    columns = causal.metrics["grid"][1]
    pixels = weights @ with_first_row(valid, columns)
    accuracy = {}
    for mask, x in right.items():
        accuracy[mask] = weights @ with_first_row(x, columns) / pixels
    share = causal.counts.labelled.sum(0).double()
    standardised = standardised_accuracy(
        right,
        valid,
        causal.patch_classes,
        share / share.sum(),
        weights,
        columns,
    )
    return {
        "site": site,
        **{key: causal.metrics[key] for key in ("grid", "images", "untrained")},
        **gaps(accuracy),
        "by_class": gaps(standardised),
    }


def with_first_row(
    counts: Tensor,
    columns: int,
    patches: int | None = None,
) -> Tensor:
    """Return the first counts by patch f[N, T], and the sum over those of the first row as the last one, f64."""
    first_row = counts[:, :columns].sum(1, keepdim=True)
    return torch.cat([counts[:, :patches], first_row], 1).double()


def standardised_accuracy(
    right: dict[str, Tensor],
    valid: Tensor,
    labels: Tensor,
    share: Tensor,
    weights: Tensor,
    columns: int,
) -> dict[str, Tensor]:
    """Return the accuracy by mask at the first patches, and of the first row, f64[1 + R, FIRST_PATCHES + 1].

    Args:
        right: Correctly predicted pixels by image and patch, f[N, T], by mask.
        valid: Labelled pixels, f[N, T].
        labels: Class of each patch, long[N, T], -1 if unlabelled.
        share: f64[K], the mix of classes that every patch is given.
        weights: f64[1 + R, N], of the images and of their resamplings.
        columns: Patches of a row.
    """
    total = dict.fromkeys(right, 0.0)
    mix = 0.0
    for k in share.nonzero().flatten().tolist():
        of_class = labels == k
        pixels = weights @ with_first_row(valid * of_class, columns, FIRST_PATCHES)
        mix += share[k] * (pixels > 0)
        for mask, x in right.items():
            correct = weights @ with_first_row(x * of_class, columns, FIRST_PATCHES)
            accuracy = torch.where(pixels > 0, correct / pixels, 0.0)
            total[mask] = total[mask] + share[k] * accuracy
    return {mask: values / mix for mask, values in total.items()}


def gaps(accuracy: dict[str, Tensor]) -> dict[str, Any]:
    """Return both accuracies and the gap by patch, and of the last column as "first_row", from f64[1 + R, T + 1]."""
    gap = accuracy["bidirectional"] - accuracy["causal"]
    columns = {mask: values[0].tolist() for mask, values in accuracy.items()}
    columns["gap"] = gap[0].tolist()
    columns["gap_ci95"] = [Estimate.from_vector(values).ci95 for values in gap.T]
    *_, last = zip(*columns.values(), strict=True)
    first_row = dict(zip(columns, last, strict=True))
    return {key: values[:-1] for key, values in columns.items()} | {"first_row": first_row}
