"""What a solver finds for a site: linear probes at some strengths of regularisation.

Legend: R strengths that were solved, B images, T tokens, d width, K channels of a probe.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.heads import Probe
from probes.score.strengths import CONVERGED, GRADIENT, SiteStrengths
from probes.tasks import SEGMENTATION, Task

from .space import full_precision


class Certificate(NamedTuple):
    """How far a point can be from the minimum of a convex objective.

    Args:
        gradient: Norm of the gradient in whitened coordinates, relative to that at w = 0.
        decrease: Decrease in nats that a further step is expected to have.
    """

    gradient: float
    decrease: float

    @property
    def converged(self) -> bool:
        """Both are below their tolerance."""
        return self.gradient < GRADIENT and self.decrease < CONVERGED


@dataclass
class Solution:
    """Linear probes of a site, on the CPU.

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

    def __post_init__(self):
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.cpu())

    @property
    def row(self) -> int:
        """Index of the chosen strength among those that were solved."""
        return self.solved.tolist().index(int(self.chosen))

    @full_precision()
    def logits(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the logits f32[R, B, K, h, w] of states f[B, T, d], on their device."""
        x = states.float() - self.mean.to(states.device).float()
        weights = self.weights.to(x)
        bias = self.bias.to(x)[:, None, :, None]
        logits = torch.einsum("btd,rkd->rbkt", x, weights) + bias
        return logits.unflatten(-1, grid)

    def entry(self, site: str, scores: dict[str, list[float]], task: Task) -> SiteStrengths:
        """Return the site's entry of metrics.json["path"].

        Args:
            site: Name of the site.
            scores: R scores by name.
            task: Names the cross-validated loss.
        """
        strengths = self.strengths.tolist()
        loss_name = "cv_loss"
        if task.name == SEGMENTATION:
            loss_name = "cv_cross_entropy"
        entry = {
            "site": site,
            "strengths": strengths,
            loss_name: self.loss.tolist(),
            "chosen": strengths[int(self.chosen)],
            "lowest": strengths[int(self.loss.argmin())],
        }
        for name, values in scores.items():
            entry[name] = self._by_strength(values)
        if len(self.certificates):
            certificates = []
            for numbers in self.certificates.tolist():
                certificate = Certificate(*numbers)
                fields = certificate._asdict()
                certificates.append(fields | {"converged": certificate.converged})
            entry["certificates"] = self._by_strength(certificates)
        return entry

    def _by_strength(self, values: list[Any]) -> list[Any]:
        """Return values of the strengths that were solved, and None for the others."""
        values_by_index = dict(zip(self.solved.tolist(), values, strict=True))
        return [values_by_index.get(index) for index in range(len(self.strengths))]

    def set_probe(self, probe: Probe) -> None:
        """Give a probe with batch norm the weights of the chosen strength."""
        norm = probe.norm
        norm.running_mean.copy_(self.mean)
        variance = self.scale.clamp(min=1e-30).pow(-2)
        norm.running_var.copy_(torch.where(self.scale > 0, variance, 1))
        deviation = (norm.running_var + norm.eps).sqrt()
        chosen = self.weights[self.row].to(probe.head.weight)
        probe.head.weight.copy_(chosen * deviation)
        probe.head.bias.copy_(self.bias[self.row])
