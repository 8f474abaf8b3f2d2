"""States of an object's tokens, and of random ones, replaced by another image's.

Shapes: N images, B of a batch, T image tokens, L layers, D draws, R resamplings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.routes.cuts import BandEntry, band_entries, random_patches
from probes.heads import Probe
from probes.models.frozen_mllm import FrozenMLLM
from probes.score.estimate import Estimate, EstimateEntry

from . import GROUPS, PatchingOptions


def other_images(images: int, seed: int) -> list[int]:
    """Return for each of several images another one: the next one in a random order."""
    order = np.random.default_rng(seed).permutation(images)
    others = np.empty(images, int)
    others[order] = np.roll(order, -1)
    return others.tolist()


def object_tokens(truth: Tensor) -> Tensor:
    """Return the tokens of the class with the most patches in each image, bool[B, T], of classes long[B, T]."""
    most = torch.full((len(truth), 1), -2)  # the class of no token
    for i, labels in enumerate(truth):
        labelled = labels[labels >= 0]
        if len(labelled):
            most[i] = labelled.mode().values
    return truth == most


@dataclass(frozen=True)
class Experiment:
    """The model that is patched, and the probe that reads it."""

    mllm: FrozenMLLM
    probe: Probe
    options: PatchingOptions

    @torch.no_grad()
    def patch(
        self, samples: Mapping[int, Mapping[str, Any]], others: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Return the results of a batch by "total" and group, f[B] and f[B, L].

        Args:
            samples: Images and targets by index.
            others: The image for each whose states it is given.
        """
        site = self.options.site
        sites = self.options.places
        labels = []
        for sample in samples.values():
            patches = self.mllm.geometry.patches(sample["target"])
            labels.append(patches.flatten())
        truth = torch.stack(labels)
        labelled = truth >= 0
        pixels = self.mllm.preprocess([sample["image"] for sample in samples.values()])
        new = self.mllm.states(self.mllm.preprocess([*others]), [*sites, site])
        unpatched = self._log_odds(self.mllm.states(pixels, [site]), truth)
        tokens = object_tokens(truth)
        random = []
        for i, of_image in zip(samples, tokens, strict=True):
            drawn = random_patches(of_image, self.options.draws, [self.options.seed, i])
            random.append(drawn)
        replaced = torch.stack([tokens, *torch.stack(random, 1)])  # bool[1 + D, B, T]
        total = self._log_odds(new, truth) - unpatched
        results = {"total": mean_over(total, labelled)}
        by_layer: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
        for place in sites:
            patched = self._patched(
                pixels, place=place, new=new[place], replaced=replaced, truth=truth
            )
            of_object, *of_draws = patched - unpatched
            random_changes = []
            differences = []
            for of_random, drawn in zip(of_draws, replaced[1:], strict=True):
                neither = labelled & ~tokens & ~drawn
                random_changes.append(mean_over(of_random, neither))
                differences.append(mean_over(of_object - of_random, neither))
            by_layer["patched"].append(mean_over(of_object, labelled & tokens))
            by_layer["others"].append(mean_over(of_object, labelled & ~tokens))
            by_layer["random"].append(torch.stack(random_changes).mean(0))
            by_layer["difference"].append(torch.stack(differences).mean(0))
        return results | {group: torch.stack(values, 1) for group, values in by_layer.items()}

    def _patched(
        self, pixels: Tensor, place: str, new: Tensor, replaced: Tensor, truth: Tensor
    ) -> Tensor:
        """Return the log-odds f[1 + D, B, T] if states at a site are `new` f[B, T, d] at tokens bool[1 + D, B, T]."""
        sets, images = replaced.shape[:2]
        chosen = replaced.flatten(0, 1).to(new.device)[..., None]
        states = self.mllm.states(
            pixels,
            [self.options.site],
            rows=[*range(images)] * sets,
            hooks={place: lambda states: torch.where(chosen, new.repeat(sets, 1, 1), states)},
        )
        return self._log_odds(states, truth.repeat(sets, 1)).unflatten(0, (sets, images))

    def _log_odds(self, states: dict[str, Tensor], truth: Tensor) -> Tensor:
        """Return log p / (1 - p) of the true class at the read-out, f[B, T] on the CPU; 0 where there is none."""
        logits = self.probe(states[self.options.site].float()).cpu()
        true = truth.clamp(min=0)[..., None]
        of_true = logits.gather(-1, true)[..., 0]
        of_others = logits.scatter(-1, true, -torch.inf).logsumexp(-1)
        return torch.where(truth >= 0, of_true - of_others, 0)


def mean_over(values: Tensor, patches: Tensor) -> Tensor:
    """Return the mean of f[B, T] over the patches bool[B, T] of each image, f[B]; NaN without patches."""
    return torch.where(patches, values, 0).sum(1) / patches.sum(1)


class PatchingResults(TypedDict, total=False):
    """Content of patching.json: changes in nats, by group of patches and layer."""

    site: str
    layers: tuple[int, ...]
    images: int
    total: EstimateEntry
    patched: list[BandEntry]
    others: list[BandEntry]
    random: list[BandEntry]
    difference: list[BandEntry]


def patching_effects(
    tensors: dict[str, Tensor], options: PatchingOptions, groups: Tensor | None = None
) -> PatchingResults:
    """Return the means of patching.safetensors, with intervals; a group without patches in any image is left out.

    Args:
        tensors: "total" f[N] and by group f[N, L], in nats; NaN for an image without patches.
        options: The layers, and the seed of the bootstrap.
        groups: long[n], the group of each validation image, with which it is resampled; n >= N.
    """
    total = tensors["total"].double()
    if groups is not None:
        groups = groups[: len(total)]
    weights = bootstrap_weights(len(total), seed=options.seed, groups=groups)
    mean, resampled = nan_mean(total[:, None], weights)
    results: PatchingResults = {
        "images": len(total),
        "total": Estimate(mean.item(), resampled[:, 0]).json(),
    }
    for group in GROUPS:
        values = tensors[group].double()
        if values.isnan().all():
            continue
        mean, resampled = nan_mean(values, weights)
        layers = [{"layer": layer} for layer in options.layers]
        results[group] = band_entries(layers, mean, resampled)
    return results


def nan_mean(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of f[N, L] over images without NaN, f[L], and those under weights f[R, N], f[R, L]."""
    valid = ~values.isnan()
    filled = torch.where(valid, values, 0)
    mean = filled.sum(0) / valid.sum(0)
    weights = weights.double()
    resampled = (weights @ filled) / (weights @ valid.double())
    return mean, resampled
