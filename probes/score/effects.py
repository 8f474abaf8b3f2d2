"""Drop-off, recovery and gains over layers, as numbers with resamplings.

The best layer of an effect is chosen by cross-validation over images: no image takes part in the choice of its own
layer, so that the maximum over many layers is not biased upwards. Each resampling chooses anew. With the choice kept,
intervals of layers that are about as good as each other are a third too narrow
(`experiments/statistics/best_layer.py`).

A score is a function of sums over images, `sums` f[S, N, M], see :mod:`probes.tasks`. Scores are signed so that higher
is better.

Shapes: R resamplings, S sites, N images, F folds, T patches, M sums per image.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llava_bidir.common.errors import error_context
from probes.models.sites import ADAPTER, ENCODER, PATCHES, is_layer
from probes.ops.pixel_counts import Counts
from probes.score.estimate import Estimate
from probes.score.strengths import Strengths
from probes.tasks import Task

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


@dataclass(frozen=True)
class Reading:
    """The score of a site that effects read.

    Args:
        score: The main score, higher is better.
        sites: Indices of the sites that it is of: several if folds have chosen different layers.
    """

    score: Estimate
    sites: list[int]


def main_score(task: Task, sums: Tensor) -> Tensor:
    """Return the main score f64[...], higher is better, of sums f[..., M] over images."""
    return task.sign * task.dataset_scores(sums)[task.score]


def image_folds(images: int, groups: Tensor | None) -> Tensor:
    """Return the fold i64[N] of each image, at most FOLDS; images of one of several groups i64[N] share a fold."""
    unit = torch.arange(images) if groups is None else torch.unique(groups, return_inverse=True)[1]
    return (unit if unit.any() else torch.arange(images)) % FOLDS


def cross_validated_layers(task: Task, sums: Tensor, fold: Tensor, weights: Tensor) -> Tensor:
    """Return for each resampling and fold the index i64[R, F] of the layer that is best on the images of other folds.

    Where all images are in one fold, it is the layer that is best on them.

    Args:
        task: The task.
        sums: Sums per image of the layers, f64[S, N, M].
        fold: Fold i64[N] of each image.
        weights: f64[R, N].
    """
    members = fold == torch.arange(int(fold.max()) + 1)[:, None]  # [F, N]
    drawn = torch.stack([weights[:, rows].sum(1) for rows in members])
    alone = drawn == drawn.sum(0)  # [F, R]
    scores = []
    for layer in sums:
        by_fold = torch.stack([weights[:, rows] @ layer[rows] for rows in members])  # [F, R, M]
        total = by_fold.sum(0)
        others = torch.where(alone[..., None], total, total - by_fold)
        scores.append(main_score(task, others))
    return torch.stack(scores).nan_to_num(-torch.inf).argmax(0).T


def read_scores(
    sites: list[str],
    last: str | None,
    task: Task,
    sums: Tensor,
    weights: Tensor,
    groups: Tensor | None,
) -> dict[str, Reading]:
    """Return the readings of the sites of `EFFECTS` that were probed; see :func:`run_effects` for the arguments."""
    sums = sums.double()
    # the dataset, then its resamplings
    weights = torch.cat([torch.ones_like(weights[:1]), weights]).double()
    places = {ENCODER: ENCODER, ADAPTER: ADAPTER, PATCHES: PATCHES, LAST_LAYER: last}
    readings = {}
    for name, site in places.items():
        if site in sites:
            i = sites.index(site)
            readings[name] = Reading(Estimate.from_vector(main_score(task, weights @ sums[i])), [i])
    layers = [i for i, site in enumerate(sites) if is_layer(site)]
    if layers:
        fold = image_folds(sums.shape[1], groups)
        chosen = cross_validated_layers(task, sums=sums[layers], fold=fold, weights=weights)
        of_image = chosen[:, fold]  # [R, N]
        read = sum((weights * (of_image == i)) @ sums[layer] for i, layer in enumerate(layers))
        estimate = Estimate.from_vector(main_score(task, read))
        readings[BEST_LAYER] = Reading(estimate, sorted({layers[i] for i in chosen[0].tolist()}))
    return readings


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
    """Return the effects of a run, from which reports evaluate claims; one is missing if a site of it was not probed.

    They are drop-off and recovery of an MLLM, and gains over layers of an encoder. The plain maximum over layers, the
    paper's definition, is "recovery" in the "summary" of metrics.json.

    "EFFECT" is of its probes, "EFFECT@ROW" at the chosen strengths or their neighbours: one that holds at each of them
    does not depend on the choice. "converged" says whether the probes of all sites that it reads have converged there.

    Args:
        sites: Names of the sites.
        last: The last layer of a bare encoder, probed or not; None of a model with an LLM.
        task: The task.
        sums: Sums per image, f[S, N, M].
        weights: f[R, N], of the bootstrap.
        groups: Group i64[N] of each image, or None.
        strengths: The path of solved probes; None: they were trained.
        path: The sums at its strengths, f[L, S, N, M].
        counts: Counts by patch, of segmentation.
        columns: Patches of a row.
    """
    rows = strengths.neighbours() if strengths else {}
    effects = {}
    for at, row in ({"": None} | {f"@{name}": row for name, row in rows.items()}).items():
        of_row = sums if row is None else path[row, torch.arange(len(sites))]
        readings = read_scores(
            sites, last=last, task=task, sums=of_row, weights=weights, groups=groups
        )
        for name, (first, second) in EFFECTS.items():
            if first in readings and second in readings:
                effect = readings[first].score - readings[second].score
                if row is not None:
                    sites_read = readings[first].sites + readings[second].sites
                    about = {"converged": not strengths.unconverged(row, sites_read)}
                    effect = replace(effect, about=about)
                effects[name + at] = effect
    if counts is not None:
        effects |= patch_accuracies(sites, counts=counts, columns=columns, weights=weights)
    return effects


def patch_accuracies(
    sites: list[str], counts: Counts, columns: int, weights: Tensor
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
    patches = {"patch_0": slice(1), "first_row": slice(columns), "rest_of_row": slice(1, columns)}
    estimates = {}
    for site, of_site in zip(sites, counts.patch_right, strict=True):
        for name, part in patches.items() if is_layer(site) else ():
            right, valid = (x.double()[:, part].sum(1) for x in (of_site, counts.patch_valid))
            accuracy = (right.sum() / valid.sum()).item()
            resampled = (weights @ right) / (weights @ valid)
            estimates[f"{name}@{site}"] = Estimate(accuracy, resampled)
    return estimates


EFFECTS_FILE = "effects.safetensors"


def effect_file(
    effects: Mapping[str, Estimate], run: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a file of effects; `run` is the fingerprint of the probes of an analysis."""
    tensors = {name: estimate.vector for name, estimate in effects.items()}
    about = {name: estimate.about for name, estimate in effects.items()}
    return tensors, {"effects": json.dumps({"run": run, "about": about})}


def read_effect_file(path: Path) -> tuple[dict[str, Estimate], str | None]:
    """Return the effects of a file, and the fingerprint of the probes of an analysis.

    Raises:
        UserError: The file is damaged.
    """
    with error_context(path), safe_open(path, "pt") as file:
        metadata: dict[str, Any] = json.loads(file.metadata()["effects"])
        effects = {
            name: Estimate.from_vector(file.get_tensor(name), entry)
            for name, entry in metadata["about"].items()
        }
    return effects, metadata["run"]
