"""Scores of a site's probes at every strength of regularisation: the path.

Legend: R strengths, S sites, N images, K classes, d width.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.evaluation.bootstrap import dataset_scores
from probes.evaluation.metrics import Counts
from probes.evaluation.segmentation_metric import SegmentationMetric, concatenate
from probes.ops.cross_entropy import upsampled_cross_entropy

from .moments import full_precision


class PathResults(NamedTuple):
    """Counts [R * S, N, ...] of each strength and site, strength by strength, and each image's loss f64[R * S, N]."""

    counts: Counts
    cross_entropy: Tensor


class PathMetric(SegmentationMetric):
    """Counts and summed losses per image, of all strengths and sites."""

    def __init__(self, probes: int, images: int, classes: int, geometry):
        super().__init__(probes, images, classes, geometry, by_token=False)
        self.add_state("cross_entropy", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, index: Tensor) -> None:
        """Add images: `logits` f[R * S, B, K, h, w], `target` uint8[B, H, W], `index` i64[B]."""
        super().update(logits, target, index)
        view = self.geometry.view(tuple(target.shape[-2:]))
        for i in range(len(target)):
            loss = upsampled_cross_entropy(logits[:, i : i + 1], target[i : i + 1], view=view, reduction="sum")
            self.cross_entropy.append(loss.double()[None])

    def compute(self) -> PathResults:
        """Return the results of the dataset, images in its order."""
        counts = super().compute()
        order = concatenate(self.index).argsort()
        return PathResults(counts, concatenate(self.cross_entropy)[order].T)


@dataclass
class ProbePath:
    """Linear probes of all sites along a grid of strengths.

    Args:
        strengths: The grid.
        weights: f32[R, K, d] by site, for x - mean.
        bias: f32[R, K] by site.
        loss: Cross-validated loss per pixel, f64[R] by site: cross-entropy in nats, or squared error.
        certificates: Certificates of the optimum by site and strength; empty for the closed form.
    """

    strengths: tuple[float, ...]
    weights: dict[str, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    loss: dict[str, Tensor] = field(default_factory=dict)
    certificates: dict[str, list[Any]] = field(default_factory=dict)

    def best(self, site: str) -> int:
        """Return the index of the strength with the lowest cross-validated loss."""
        return int(self.loss[site].argmin())

    @full_precision()
    def logits(self, centred: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Return the logits f32[R * S, B, K, h, w] of states x - mean f32[B, T, d] by site."""
        by_site = [
            torch.einsum("btd,rkd->rbkt", x, self.weights[site].to(x)) + self.bias[site].to(x)[:, None, :, None]
            for site, x in centred.items()
        ]
        return torch.stack(by_site, 1).flatten(0, 1).unflatten(-1, grid)

    def entries(self, scores: dict[str, Tensor], sites: list[str], loss: str) -> dict[str, Any]:
        """Return scores f[R * S] by name for metrics.json, with the cross-validated loss under its name."""
        by_site = {name: x.view(len(self.strengths), len(sites)).T.tolist() for name, x in scores.items()}
        entries = []
        for i, site in enumerate(sites):
            entry = {"site": site} | {name: values[i] for name, values in by_site.items()}
            entry |= {loss: self.loss[site].tolist(), "chosen": self.strengths[self.best(site)]}
            if site in self.certificates:
                entry["certificates"] = [c._asdict() | {"converged": c.converged} for c in self.certificates[site]]
            entries.append(entry)
        return {"strengths": list(self.strengths), "sites": entries}

    def to_json(self, results: PathResults, sites: list[str]) -> dict[str, Any]:
        """Return the segmentation scores of every strength by site, for metrics.json."""
        score, pixels = dataset_scores(results.counts), results.counts.labelled.sum()
        scores = {"miou": score.miou, "pacc": score.pacc, "cross_entropy": results.cross_entropy.sum(1) / pixels}
        return self.entries(scores, sites, "cv_cross_entropy")

    def tensors(self, results: PathResults, name: str, sites: int) -> dict[str, Tensor]:
        """Return the counts and losses per image, "NAME/intersection" i32[R, S, N, K] and so on."""
        split = lambda x: x.unflatten(0, (len(self.strengths), sites))
        return {
            f"{name}/intersection": split(results.counts.intersection).int(),
            f"{name}/predicted": split(results.counts.predicted).int(),
            f"{name}/cross_entropy": split(results.cross_entropy),
        }
