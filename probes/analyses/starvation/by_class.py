"""Starvation with the classes held fixed: early patches are mostly sky and ceiling, at which a mask might be better.

    standardised   accuracy by patch as if every patch showed the classes in the same mix: its accuracy on each class,
                   weighted by the class's share of the split's labelled pixels (direct standardisation). A class that
                   never occurs at a patch is left out there, for both masks.
    groups         the gap over the first row on the frequent, the middling and the rare third of the classes

A patch counts for the class that most of its labelled pixels have.

Shapes: N images, T patches, K classes, R resamplings.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from probes.evaluation.metrics import true_classes
from probes.results.probe_run import ProbeRun

from .patch_accuracy import Pair, PatchCounts, gap_of, gap_over

SHOWN = 50  # patches, as in Fig. 7: what is resampled takes K products of R x N by N x T
GROUPS = ("frequent", "middling", "rare")


def class_facts(run: ProbeRun, counts: Pair, weights: Tensor) -> dict:
    """What starvation.json holds under "by_class".

    Args:
        run: Either of the two, for its images.
        counts: Of both.
        weights: f[R, N] of the bootstrap.

    Returns:
        {"causal", "bidirectional", "gap", "gap_ci95": of the first 50 patches, standardised; "first_row": of the first
        row, standardised; "groups": [{"frequency", "classes", "share", "causal", "bidirectional", "gap", "gap_ci95"}]}
    """
    dataset, mllm, names = run.dataset(), run.mllm(), run.metrics["classes"]
    targets = (torch.from_numpy(dataset[i]["target"])[None] for i in tqdm(range(len(dataset)), desc="masks"))
    labels = torch.cat([true_classes(target, len(names), mllm) for target in targets])
    share = run.counts.labelled.sum(0).double()
    share /= share.sum()
    columns = run.metrics["grid"][1]
    first_row = {mask: PatchCounts(*(x[:, :columns].flatten()[:, None] for x in pair)) for mask, pair in counts.items()}
    of_row = standardised(
        first_row, labels[:, :columns].flatten()[:, None], share, weights.repeat_interleave(columns, 1)
    )
    early = {mask: PatchCounts(right[:, :SHOWN], valid[:, :SHOWN]) for mask, (right, valid) in counts.items()}
    return {
        **standardised(early, labels[:, :SHOWN], share, weights),
        "first_row": {key: values[0] for key, values in of_row.items()},
        "groups": _by_frequency(counts, labels, share, weights, names, columns),
    }


def standardised(counts: Pair, labels: Tensor, share: Tensor, weights: Tensor) -> dict[str, list]:
    """Accuracy by patch and gap as :func:`gap_of` gives them, every patch with the same mix of classes.

    Args:
        counts: f[N, T] by mask.
        labels: long[N, T], the class of each patch, -1 without one.
        share: f[K], the mix.
        weights: f[R, N].
    """
    every = torch.cat([torch.ones(1, weights.shape[1], dtype=weights.dtype), weights])  # the split itself first
    total = {mask: torch.zeros(len(every), labels.shape[1], dtype=torch.double) for mask in counts}
    mix = torch.zeros(len(every), labels.shape[1], dtype=torch.double)
    for k in share.nonzero().flatten().tolist():
        here = (labels == k).double()
        valid = every @ (next(iter(counts.values())).valid * here)
        mix += share[k] * (valid > 0)
        for mask, (right, _) in counts.items():
            total[mask] += share[k] * torch.where(valid > 0, every @ (right * here) / valid, 0.0)
    accuracy = {mask: values / mix for mask, values in total.items()}
    return gap_of({mask: x[0] for mask, x in accuracy.items()}, {mask: x[1:] for mask, x in accuracy.items()})


def _by_frequency(
    counts: Pair, labels: Tensor, share: Tensor, weights: Tensor, names: list[str], columns: int
) -> list[dict]:
    """The gap over the first row on each third of the classes; a third that does not occur there is left out."""
    ranked, groups = share.argsort(descending=True, stable=True).tolist(), []
    third = -(-len(ranked) // 3)
    for i, frequency in enumerate(GROUPS):
        members = ranked[i * third : (i + 1) * third]
        here = torch.isin(labels, torch.tensor(members)).double()
        of_group = {mask: PatchCounts(right * here, valid * here) for mask, (right, valid) in counts.items()}
        if members and of_group["causal"].valid[:, :columns].any():
            facts = {
                "frequency": frequency,
                "classes": [names[k] for k in members],
                "share": share[members].sum().item(),
            }
            groups.append(facts | gap_over(of_group, weights, range(columns)))
    return groups
