"""Starvation with the classes held fixed: early patches are mostly sky and ceiling, which one mask may predict better.

Accuracy by patch is standardised to the same mix of classes at every patch: its accuracy on each class, weighted by
the class's share of the split's labelled pixels (direct standardisation). A class that never occurs at a patch is left
out there, for both masks.

The class of a patch is that of most of its labelled pixels.

Shapes: N images, T patches, K classes, R resamplings.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from probes.runs.probe_run import ProbeRun
from probes.score.true_classes import true_classes

from .patch_accuracy import CountsByMask, PatchCounts, accuracy_gap

FIRST_PATCHES = 50  # as in Fig. 7; standardisation takes K products of R x N and N x T


def class_results(run: ProbeRun, counts: CountsByMask, weights: Tensor) -> dict:
    """Return "by_class" of starvation.json, from either run's images, and `weights` f[R, N] of the bootstrap.

    Returns:
        {"causal", "bidirectional", "gap", "gap_ci95": standardised, of the first 50 patches; "first_row": the same of
        the first row}
    """
    dataset = run.dataset()
    mllm = run.mllm()
    names = run.metrics["classes"]
    labels = []
    for i in tqdm(range(len(dataset)), desc="masks"):
        target = torch.from_numpy(dataset[i]["target"])[None]
        labels.append(true_classes(target, len(names), mllm))
    labels = torch.cat(labels)
    share = run.counts.labelled.sum(0).double()
    share /= share.sum()
    columns = run.metrics["grid"][1]
    row_counts = {
        mask: PatchCounts(*(x[:, :columns].reshape(-1, 1) for x in pair))
        for mask, pair in counts.items()
    }
    row_labels = labels[:, :columns].reshape(-1, 1)
    row_weights = weights.repeat_interleave(columns, 1)
    first_row = standardised_gap(row_counts, row_labels, share, row_weights)
    early = {
        mask: PatchCounts(*(x[:, :FIRST_PATCHES] for x in pair)) for mask, pair in counts.items()
    }
    return {
        **standardised_gap(early, labels[:, :FIRST_PATCHES], share, weights),
        "first_row": {key: values[0] for key, values in first_row.items()},
    }


def standardised_gap(
    counts: CountsByMask,
    labels: Tensor,
    share: Tensor,
    weights: Tensor,
) -> dict[str, list]:
    """Return :func:`accuracy_gap` with the same mix of classes, `share` f[K], at every patch.

    `labels` are the classes of the patches, long[N, T], -1 for unlabelled ones; `weights` those of the bootstrap.
    """
    of_split = torch.ones_like(weights[:1])
    all_weights = torch.cat([of_split, weights])
    nothing = torch.zeros(len(all_weights), labels.shape[1], dtype=torch.double)
    total = {mask: nothing.clone() for mask in counts}
    mix = nothing.clone()
    valid_pixels = counts["causal"].valid  # the same of both masks
    for k in share.nonzero().flatten().tolist():
        of_class = (labels == k).double()
        valid = all_weights @ (valid_pixels * of_class)
        mix += share[k] * (valid > 0)
        for mask, (right, _) in counts.items():
            accuracy = all_weights @ (right * of_class) / valid
            total[mask] += share[k] * torch.where(valid > 0, accuracy, 0.0)
    accuracy = {mask: values / mix for mask, values in total.items()}
    estimate = {mask: values[0] for mask, values in accuracy.items()}
    resampled = {mask: values[1:] for mask, values in accuracy.items()}
    return accuracy_gap(estimate, resampled)
