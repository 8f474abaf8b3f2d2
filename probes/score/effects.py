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
class EffectTerm:
    """One of the two scores that an effect subtracts.

    Args:
        score: The main score, higher is better.
        sites: Indices of the sites that it is of: several if folds have chosen different layers.
    """

    score: Estimate
    sites: list[int]


@dataclass(frozen=True)
class EffectSource:
    """What the effects of a run are computed from, beside the sums of its probes.

    Args:
        sites: Names of the sites.
        last_layer: The last layer of a bare encoder, probed or not; None of a model with an LLM.
        task: The task.
        weights: f[R, N], of the bootstrap.
        groups: Group i64[N] of each image, or None.
    """

    sites: list[str]
    last_layer: str | None
    task: Task
    weights: Tensor
    groups: Tensor | None = None

    def effects(self, sums: Tensor) -> dict[str, Estimate]:
        """Return the effects of probes, from which reports evaluate claims; one is missing if a site was not probed.

        They are drop-off and recovery of an MLLM, and gains over layers of an encoder. The plain maximum over layers,
        the paper's definition, is "recovery" in the "summary" of metrics.json.

        Args:
            sums: Sums per image, f[S, N, M].
        """
        return {name: effect for name, (effect, _) in self._effects_with_sites(sums).items()}

    def effects_at_strengths(self, strengths: Strengths, sums: Tensor) -> dict[str, Estimate]:
        """Return the effects "EFFECT@ROW" of solved probes at the chosen strengths and at their neighbours.

        One that holds at each of them does not depend on the choice. "converged" says whether the probes of all sites
        that it reads have converged there.

        Args:
            strengths: The strengths of each site.
            sums: Sums per image at those that were solved, f[L, S, N, M].
        """
        effects = {}
        every_site = torch.arange(len(self.sites))
        for row_name, row in strengths.neighbours().items():
            of_row = self._effects_with_sites(sums[row, every_site])
            for name, (effect, sites) in of_row.items():
                unconverged = strengths.unconverged(row, sites)
                about = {"converged": not unconverged}
                effects[f"{name}@{row_name}"] = replace(effect, about=about)
        return effects

    def patch_accuracies(self, counts: Counts, columns: int) -> dict[str, Estimate]:
        """Return the accuracy under patch 0, over the first row of patches, and over its rest, at each decoder layer.

        Their names are "patch_0@SITE", "first_row@SITE" and "rest_of_row@SITE". They are NaN where no pixel is
        labelled.

        Args:
            counts: The counts of segmentation, by patch.
            columns: Patches of a row.
        """
        weights = self.weights.double()
        valid_by_patch = counts.patch_valid.double()
        patches = {
            "patch_0": slice(1),
            "first_row": slice(columns),
            "rest_of_row": slice(1, columns),
        }
        estimates = {}
        for site, patch_right in zip(self.sites, counts.patch_right, strict=True):
            if not is_layer(site):
                continue
            right_by_patch = patch_right.double()
            for name, part in patches.items():
                right = right_by_patch[:, part].sum(1)
                valid = valid_by_patch[:, part].sum(1)
                accuracy = right.sum() / valid.sum()
                resampled = (weights @ right) / (weights @ valid)
                estimates[f"{name}@{site}"] = Estimate(accuracy.item(), resampled)
        return estimates

    def _effects_with_sites(self, sums: Tensor) -> dict[str, tuple[Estimate, list[int]]]:
        """Return each effect of sums f[S, N, M], and the indices of the sites that it reads."""
        terms = self.terms(sums)
        effects = {}
        for name, (first, second) in EFFECTS.items():
            if first in terms and second in terms:
                effect = terms[first].score - terms[second].score
                sites = terms[first].sites + terms[second].sites
                effects[name] = (effect, sites)
        return effects

    def terms(self, sums: Tensor) -> dict[str, EffectTerm]:
        """Return what `EFFECTS` subtract of sums f[S, N, M], by name; without the sites that were not probed."""
        sums = sums.double()
        everything = torch.ones_like(self.weights[:1])
        # the dataset, then its resamplings
        weights = torch.cat([everything, self.weights]).double()
        site_of_term = {
            ENCODER: ENCODER,
            ADAPTER: ADAPTER,
            PATCHES: PATCHES,
            LAST_LAYER: self.last_layer,
        }
        terms = {}
        for name, site in site_of_term.items():
            if site in self.sites:
                index = self.sites.index(site)
                score = main_score(self.task, weights @ sums[index])
                terms[name] = EffectTerm(Estimate.from_vector(score), [index])
        layers = [index for index, site in enumerate(self.sites) if is_layer(site)]
        if layers:
            terms[BEST_LAYER] = self._best_layer(layers, sums=sums, weights=weights)
        return terms

    def _best_layer(self, layers: list[int], sums: Tensor, weights: Tensor) -> EffectTerm:
        """Return the score of the layers that cross-validation chooses among those of these indices.

        Args:
            layers: Indices of the sites that are layers.
            sums: f64[S, N, M].
            weights: f64[1 + R, N], of the dataset and its resamplings.
        """
        fold = image_folds(sums.shape[1], self.groups)
        chosen = cross_validated_layers(self.task, sums=sums[layers], fold=fold, weights=weights)
        layer_of_image = chosen[:, fold]  # [1 + R, N]
        chosen_sums = 0
        for i, layer in enumerate(layers):
            chosen_sums = chosen_sums + (weights * (layer_of_image == i)) @ sums[layer]
        score = Estimate.from_vector(main_score(self.task, chosen_sums))
        chosen_by_dataset = {layers[i] for i in chosen[0].tolist()}
        return EffectTerm(score, sorted(chosen_by_dataset))


def main_score(task: Task, sums: Tensor) -> Tensor:
    """Return the main score f64[...], higher is better, of sums f[..., M] over images."""
    return task.sign * task.dataset_scores(sums)[task.score]


def image_folds(images: int, groups: Tensor | None) -> Tensor:
    """Return the fold i64[N] of each image, at most FOLDS; images of one of several groups i64[N] share a fold."""
    each_image = torch.arange(images)
    if groups is None:
        return each_image % FOLDS
    numbers, group = torch.unique(groups, return_inverse=True)
    if len(numbers) == 1:
        return each_image % FOLDS
    return group % FOLDS


def cross_validated_layers(task: Task, sums: Tensor, fold: Tensor, weights: Tensor) -> Tensor:
    """Return for each resampling and fold the index i64[R, F] of the layer that is best on the images of other folds.

    Where all images are in one fold, it is the layer that is best on them.

    Args:
        task: The task.
        sums: Sums per image of the layers, f64[S, N, M].
        fold: Fold i64[N] of each image.
        weights: f64[R, N].
    """
    folds = torch.arange(int(fold.max()) + 1)
    members = fold == folds[:, None]  # [F, N]
    drawn = torch.stack([weights[:, in_fold].sum(1) for in_fold in members])
    has_all = drawn == drawn.sum(0)  # [F, R]
    scores = []
    for layer in sums:
        by_fold = torch.stack([weights[:, in_fold] @ layer[in_fold] for in_fold in members])
        total = by_fold.sum(0)
        other_folds = total - by_fold  # [F, R, M]
        chosen_on = torch.where(has_all[..., None], total, other_folds)
        scores.append(main_score(task, chosen_on))
    by_layer = torch.stack(scores).nan_to_num(-torch.inf)
    return by_layer.argmax(0).T


EFFECTS_FILE = "effects.safetensors"


def effect_file(
    effects: Mapping[str, Estimate], run: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a file of effects; `run` is the fingerprint of the probes of an analysis."""
    tensors = {}
    about = {}
    for name, estimate in effects.items():
        tensors[name] = estimate.vector
        about[name] = estimate.about
    return tensors, {"effects": json.dumps({"run": run, "about": about})}


def read_effect_file(path: Path) -> tuple[dict[str, Estimate], str | None]:
    """Return the effects of a file, and the fingerprint of the probes of an analysis.

    Raises:
        UserError: The file is damaged.
    """
    with error_context(path), safe_open(path, "pt") as file:
        metadata: dict[str, Any] = json.loads(file.metadata()["effects"])
        effects = {}
        for name, about in metadata["about"].items():
            effects[name] = Estimate.from_vector(file.get_tensor(name), about)
    return effects, metadata["run"]
