"""Drop-off, recovery and gains over layers, as numbers with resamplings.

The best layer of an effect is chosen by cross-validation over images: no image takes part in the choice of its own
layer, so that the maximum over many layers is not biased upwards. It is chosen once and kept in all resamplings.

A score is a function of sums over images, `sums` f[S, N, M], see :mod:`probes.tasks`. Scores are signed so that higher
is better.

Shapes: R resamplings, S sites, N images, T patches, M sums per image, E sites that the effects read:
encoder, adapter and best layer of an MLLM; first, last and best layer of a bare encoder.
"""

from dataclasses import replace

import torch
from torch import Tensor

from probes.models.sites import ADAPTER, ENCODER, PATCHES, is_layer
from probes.ops.pixel_counts import Counts
from probes.tasks import Task

from .estimate import Estimate
from .resampling import dataset_scores, resampled_scores
from .strengths import Strengths

FOLDS = 10  # of validation images, to choose the best layer
BEST_LAYER = "best_layer"
LAST_LAYER = "last_layer"
# The sites whose scores each effect subtracts: the first minus the second.
EFFECTS = {
    "adapter_drop": (ENCODER, ADAPTER),
    "recovery": (BEST_LAYER, ADAPTER),
    "layer_gain": (BEST_LAYER, PATCHES),
    "over_last": (BEST_LAYER, LAST_LAYER),
}


def resampled_main_score(task: Task, sums: Tensor, weights: Tensor) -> Tensor:
    """Return the main score f64[R, S], higher is better, for weights f[R, N] of the images of sums f[S, N, M]."""
    return task.sign * resampled_scores(task, sums, weights)[task.score]


def image_folds(images: int, groups: Tensor | None) -> Tensor:
    """Return the fold i64[N] of each image, at most FOLDS; images of one of several groups i64[N] share a fold."""
    unit = torch.arange(images) if groups is None else torch.unique(groups, return_inverse=True)[1]
    return (unit if unit.any() else torch.arange(images)) % FOLDS


def cross_validated_layers(
    sites: list[str],
    task: Task,
    sums: Tensor,
    groups: Tensor | None = None,
) -> Tensor | None:
    """Return for each image the index i64[N] of the LLM layer with the best score on the images of all other folds.

    None if no LLM layer was probed. A single image has no others: its layer is the best on itself.
    """
    layers = [i for i, site in enumerate(sites) if is_layer(site)]
    if not layers:
        return None
    fold = image_folds(sums.shape[1], groups)
    others = fold != torch.arange(int(fold.max()) + 1)[:, None]
    weights = others if others.any() else ~others
    best = resampled_main_score(task, sums[layers], weights).nan_to_num(-torch.inf).argmax(1)
    return torch.tensor(layers)[best][fold]


def sites_of_effects(
    sites: list[str],
    last: str | None,
    task: Task,
    sums: Tensor,
    groups: Tensor | None,
) -> dict[str, Tensor]:
    """Return for each site that an effect reads, where probed, its index per image, i64[N]."""
    index = {site: sites.index(site) for site in (ENCODER, ADAPTER, PATCHES) if site in sites}
    if PATCHES in sites and last in sites:  # a bare encoder
        index[LAST_LAYER] = sites.index(last)
    images = sums.shape[1]
    fixed = {site: torch.full((images,), i) for site, i in index.items()}
    best = cross_validated_layers(sites, task, sums, groups)
    return fixed if best is None else fixed | {BEST_LAYER: best}


def effects_at(
    task: Task,
    sums: Tensor,
    sites: dict[str, Tensor],
    weights: Tensor,
) -> dict[str, Estimate]:
    """Return the effects of `EFFECTS` at :func:`sites_of_effects`; one is missing if a site of it was not probed.

    They are drop-off and recovery of an MLLM, and gains over layers of an encoder. The plain maximum over layers, the
    paper's definition, is "recovery" in the "summary" of metrics.json.
    """
    if not sites:
        return {}
    read = sums[torch.stack(list(sites.values())), torch.arange(sums.shape[1])]  # [E, N, M]
    values = (task.sign * dataset_scores(task, read)[task.score]).tolist()
    resampled = resampled_main_score(task, read, weights)
    estimates = {site: Estimate(values[i], resampled[:, i]) for i, site in enumerate(sites)}
    return {
        name: estimates[a] - estimates[b]
        for name, (a, b) in EFFECTS.items()
        if a in estimates and b in estimates
    }


def effects_by_row(
    sites: list[str],
    last: str | None,
    strengths: Strengths,
    task: Task,
    path: Tensor,
    weights: Tensor,
    groups: Tensor | None,
) -> dict[str, Estimate]:
    """Return the effects of solved probes at the chosen strengths and their neighbours, "EFFECT@ROW".

    An effect that holds at each of them does not depend on the choice. "converged" says whether the probes of all
    sites that it reads have converged at its strengths.

    Args:
        sites: Names of the sites.
        last: The model's last layer, probed or not.
        strengths: The path.
        task: The task.
        path: The sums at the L solved strengths of each site, f[L, S, N, M].
        weights: f[R, N], of the bootstrap.
        groups: Group i64[N] of each image, or None.
    """
    estimates = {}
    for name, row in strengths.neighbours().items():
        sums = path[row, torch.arange(len(sites))]
        read = sites_of_effects(sites, last, task, sums, groups)
        for effect, estimate in effects_at(task, sums, read, weights).items():
            indices = torch.cat([read[site].unique() for site in EFFECTS[effect]]).tolist()
            about = {"converged": strengths.has_converged(row, indices)}
            estimates[f"{effect}@{name}"] = replace(estimate, about=about)
    return estimates


def run_effects(
    sites: list[str],
    last: str | None,
    task: Task,
    sums: Tensor,
    weights: Tensor,
    groups: Tensor | None,
    strengths: Strengths | None = None,
    path: Tensor | None = None,
    counts: Counts | None = None,
    columns: int = 1,
) -> dict[str, Estimate]:
    """Return the effects of a run, from which reports evaluate claims: of its probes, and of each row of strengths.

    Args:
        sites: Names of the sites.
        last: The model's last layer, probed or not.
        task: The task.
        sums: Sums per image, f[S, N, M].
        weights: f[R, N], of the bootstrap.
        groups: Group i64[N] of each image, or None.
        strengths: The path of solved probes; None: they were trained.
        path: The sums at its strengths, f[L, S, N, M].
        counts: Counts by patch, of segmentation.
        columns: Patches of a row.
    """
    read = sites_of_effects(sites, last, task, sums, groups)
    effects = effects_at(task, sums, read, weights)
    if strengths is not None:
        effects |= effects_by_row(
            sites,
            last,
            strengths,
            task,
            path,
            weights,
            groups,
        )
    if counts is not None:
        effects |= patch_accuracies(sites, counts, columns, weights)
    return effects


def patch_accuracies(
    sites: list[str],
    counts: Counts,
    columns: int,
    weights: Tensor,
) -> dict[str, Estimate]:
    """Return the accuracy under patch 0, over the first row of patches, and over the rest of it, at each decoder layer.

    Their names are "patch_0@SITE", "first_row@SITE" and "rest_of_row@SITE". They are NaN where no pixel is labelled.

    Args:
        sites: Names of the sites.
        counts: The counts, by patch.
        columns: Patches of a row.
        weights: f[R, N], of the bootstrap.
    """
    weights = weights.double()
    valid = _pool(counts.patch_valid.double(), columns)
    estimates = {}
    for site, right in zip(sites, counts.patch_right, strict=True):
        if not is_layer(site):
            continue
        right = _pool(right.double(), columns)
        accuracy = right.sum(0) / valid.sum(0)
        resampled = (weights @ right) / (weights @ valid)
        for i, name in enumerate(("patch_0", "first_row", "rest_of_row")):
            estimates[f"{name}@{site}"] = Estimate(accuracy[i].item(), resampled[:, i])
    return estimates


def _pool(counts: Tensor, columns: int) -> Tensor:
    """Return the sums f[N, 3] of counts by patch f[N, T]: of patch 0, of the first row, and of that without patch 0."""
    first_row = counts[:, :columns].sum(1)
    rest_of_row = counts[:, 1:columns].sum(1)
    return torch.stack([counts[:, 0], first_row, rest_of_row], 1)
