"""Solved probes of a site along its path of strengths, and their scores in metrics.json.

Legend: R strengths that were solved, S sites, N images, K classes, d width.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from probes.evaluation.image_metric import ImageMetric
from probes.evaluation.metrics import Counts
from probes.evaluation.segmentation_metric import SegmentationMetric
from probes.ops.cross_entropy import loss_and_gradient
from probes.ops.geometry import Geometry
from probes.ops.quadrature import PreparedMasks

from .moments import full_precision
from .optimum import Certificate


@dataclass
class SolvedSite:
    """Linear probes of a site.

    Args:
        strengths: f64[n], from strong to weak.
        loss: f64[n], cross-validated loss per pixel at each strength: cross-entropy in nats, or squared error.
        chosen: i64[], index of the chosen strength.
        solved: i64[R], indices of the strengths whose probes follow; the same number at each site.
        mean: f64[d] of the states.
        scale: f64[d], D^-1/2; 0 for constant channels.
        weights: f32[R, K, d], of x - mean.
        bias: f32[R, K].
        certificates: f64[R, 2], fields of `Certificate`; f64[0, 2] for the closed form.
    """

    strengths: Tensor
    loss: Tensor
    chosen: Tensor
    solved: Tensor
    mean: Tensor
    scale: Tensor
    weights: Tensor
    bias: Tensor
    certificates: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def row(self) -> int:
        """Index of the chosen strength among those that were solved."""
        return self.solved.tolist().index(int(self.chosen))

    @full_precision()
    def logits(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the logits f32[R, B, K, h, w] of states f[B, T, d], on their device."""
        x = states.float() - self.mean.to(states.device).float()
        logits = torch.einsum("btd,rkd->rbkt", x, self.weights.to(x)) + self.bias.to(x)[:, None, :, None]
        return logits.unflatten(-1, grid)

    def entry(self, site: str, scores: dict[str, list[float]], loss_name: str) -> dict[str, Any]:
        """Return the site's entry of metrics.json["path"]; each list has a value, or null, for each strength.

        Args:
            site: Name of the site.
            scores: R scores by name.
            loss_name: Name of the cross-validated loss.
        """
        strengths, solved = self.strengths.tolist(), self.solved.tolist()
        along = lambda values: [dict(zip(solved, values, strict=True)).get(i) for i in range(len(strengths))]
        entry = {"site": site, "strengths": strengths, loss_name: self.loss.tolist()}
        entry |= {"chosen": strengths[int(self.chosen)], "lowest": strengths[int(self.loss.argmin())]}
        entry |= {name: along(values) for name, values in scores.items()}
        if len(self.certificates):
            found = [Certificate(*numbers) for numbers in self.certificates.tolist()]
            entry["certificates"] = along([c._asdict() | {"converged": c.converged} for c in found])
        return entry


class PathMetric(SegmentationMetric):
    """Counts per image of some probes, and the summed losses of all probes.

    Args:
        counted: Probes whose predictions are counted, by index; the others are counted elsewhere.
        images, classes, geometry: As for `SegmentationMetric`.
    """

    def __init__(self, counted: list[int], images: int, classes: int, geometry: Geometry):
        super().__init__(len(counted), images, classes, geometry, by_token=False)
        self.counted, self.names = counted, (*self.names, "cross_entropy")
        self.add_state("cross_entropy", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor, index: Tensor, masks: PreparedMasks) -> None:
        """Add images: `logits` f[P, B, K, h, w], `target` uint8[B, H, W], `index` i64[B], and prepared masks."""
        super().update(logits[self.counted], target, index)
        self.cross_entropy.append(loss_and_gradient(logits, masks, needs_grad=False)[0].T)

    def compute(self) -> tuple[Counts, Tensor]:
        """Return the counts of the counted probes, and the loss of each probe and image f64[P, N]."""
        return super().compute(), ImageMetric.compute(self)["cross_entropy"].T
