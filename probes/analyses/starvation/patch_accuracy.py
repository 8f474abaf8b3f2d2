"""Accuracy by patch of two runs on the same images, and the gap between them.

For other tasks than segmentation, the mean error takes the place of accuracy, and the gap is causal minus
bidirectional: it is positive where bidirectional attention is better.

Shapes: N images, T patches, R resamplings.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.bootstrap import Estimate, interval
from llava_bidir.common.errors import UserError
from probes.data.batches import PreprocessedDataset, collate, group_by_mask_size
from probes.evaluation.metrics import count
from probes.results.probe_run import ProbeRun
from probes.results.task_run import TaskRun

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM


class PatchCounts(NamedTuple):
    """Correctly predicted pixels, or summed errors, and labelled pixels by image and patch, f[N, T] each."""

    right: Tensor
    valid: Tensor

    def pool(self, *groups: Sequence[int]) -> "PatchCounts":
        """Return the sums over G groups of patches, f[N, G]."""
        return PatchCounts(*(torch.stack([x[:, list(patches)].sum(1) for patches in groups], 1) for x in self))


CountsByMask = dict[str, PatchCounts]  # keys "causal" and "bidirectional"


def patch_counts(run: ProbeRun | TaskRun, site: str) -> PatchCounts:
    """Return the counts, or errors, of a finished run at one site.

    Raises:
        UserError: The run has no such site, or its task has no errors by position.
    """
    if site not in run.sites:
        raise UserError(f"{run.path} has no site {site!r}; it has {', '.join(run.sites)}")
    if isinstance(run, TaskRun):
        error, valid = run.patch_errors
        return PatchCounts(error[run.sites.index(site)].double(), valid.double())
    return PatchCounts(run.counts.patch_right[run.sites.index(site)].double(), run.counts.patch_valid.double())


@torch.no_grad()
def count_patches(
    mllm: "FrozenMLLM",
    dataset: Dataset,
    probes: Sequence[tuple[str, Callable[[Tensor], Tensor]]],
    title: str,
    batch_size: int = 32,
) -> list[PatchCounts]:
    """Return the counts of several probes on a dataset, in one pass.

    Args:
        mllm: The model.
        dataset: Images with masks.
        probes: Pairs of a site and a function from its states f[B, T, d] to logits f[B, T, K].
        title: Title of the progress bar.
        batch_size: Images per forward.
    """
    parts, sites = [], list(dict.fromkeys(site for site, _ in probes))
    loader = DataLoader(PreprocessedDataset(dataset, mllm.preprocess), batch_size, collate_fn=collate)
    for batch in tqdm(loader, desc=title, mininterval=5):
        states = mllm.states(batch["pixels"], sites)
        logits = torch.stack([probe(states[site].float()) for site, probe in probes])
        logits = logits.transpose(-1, -2).unflatten(-1, mllm.grid)
        patches = torch.empty(2, *logits.shape[:2], mllm.grid[0] * mllm.grid[1], dtype=torch.double)
        for images, target in group_by_mask_size(batch["target"]):
            view = mllm.geometry.view(tuple(target.shape[-2:]))
            counts = count(logits[:, images], target.to(mllm.device), view)
            patches[0, :, images], patches[1, :, images] = counts.patch_right.cpu().double(), counts.patch_valid.cpu()
        parts.append(patches)
    return [PatchCounts(*pair) for pair in torch.cat(parts, 2).transpose(0, 1)]


def count_run_patches(
    run: ProbeRun, mllm: "FrozenMLLM", site: str, dataset: Dataset, title: str, batch_size: int = 32
) -> PatchCounts:
    """Return the counts of a run's frozen probe on images, or under a model, that differ from the run's own."""
    probe = run.probes()[site].to(mllm.device)
    return count_patches(mllm, dataset, [(site, probe)], f"{title}, {run.metrics['image_attention']}", batch_size)[0]


def patch_accuracy(counts: CountsByMask, weights: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return accuracy by patch, f[T], and under each resampling `weights` f[R, N], f[R, T]; both by mask."""
    return (
        {mask: right.sum(0) / valid.sum(0) for mask, (right, valid) in counts.items()},
        {mask: (weights @ right) / (weights @ valid) for mask, (right, valid) in counts.items()},
    )


def accuracy_gap(accuracy: dict[str, Tensor], resampled: dict[str, Tensor], sign: int = 1) -> dict[str, list]:
    """Return {"causal", "bidirectional", "gap": [T], "gap_ci95": [[lo, hi]]} from the results of `patch_accuracy`.

    `sign` is -1 for errors, 1 for accuracies.
    """
    gap, resampled_gap = (sign * (x["bidirectional"] - x["causal"]) for x in (accuracy, resampled))
    return {
        **{mask: values.tolist() for mask, values in accuracy.items()},
        "gap": gap.tolist(),
        "gap_ci95": [interval(g, resampled_gap[:, i]) for i, g in enumerate(gap.tolist())],
    }


def pooled_gap(
    counts: CountsByMask, weights: Tensor, patches: Sequence[int], sign: int = 1
) -> dict[str, float | list[float]]:
    """Return the same for some patches pooled, with one number per key."""
    pooled = {mask: pixels.pool(patches) for mask, pixels in counts.items()}
    return {key: values[0] for key, values in accuracy_gap(*patch_accuracy(pooled, weights), sign).items()}


def first_gaps(counts: CountsByMask, weights: Tensor, columns: int) -> dict[str, Estimate]:
    """Return the gap at patch 0, "starvation", and over the first row, "starvation_first_row"."""
    pooled = {mask: pixels.pool([0], range(columns)) for mask, pixels in counts.items()}
    gap, resampled = (x["bidirectional"] - x["causal"] for x in patch_accuracy(pooled, weights))
    names = ("starvation", "starvation_first_row")
    return {name: (gap[i].item(), resampled[:, i]) for i, name in enumerate(names)}
