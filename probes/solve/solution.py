"""What a solver finds for a site: linear probes at some strengths of regularisation.

Legend: R strengths that were solved, B images, T tokens, d width, K channels of a probe.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probes.heads import Probe
from probes.score.strengths import CONVERGED, GRADIENT
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
        for name, x in vars(self).items():
            setattr(self, name, x.cpu())

    @property
    def row(self) -> int:
        """Index of the chosen strength among those that were solved."""
        return self.solved.tolist().index(int(self.chosen))

    @full_precision()
    def logits(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the logits f32[R, B, K, h, w] of states f[B, T, d], on their device."""
        x = states.float() - self.mean.to(states.device).float()
        bias = self.bias.to(x)[:, None, :, None]
        logits = torch.einsum("btd,rkd->rbkt", x, self.weights.to(x)) + bias
        return logits.unflatten(-1, grid)

    def entry(self, site: str, scores: dict[str, list[float]], task: Task) -> dict[str, Any]:
        """Return the site's entry of metrics.json["path"]; each list has a value, or null, for each strength.

        Args:
            site: Name of the site.
            scores: R scores by name.
            task: Names the cross-validated loss.
        """
        strengths = self.strengths.tolist()
        solved = self.solved.tolist()

        def along(values):
            by_strength = dict(zip(solved, values, strict=True))
            return [by_strength.get(i) for i in range(len(strengths))]

        entry = {
            "site": site,
            "strengths": strengths,
            "cv_loss" if task.name != SEGMENTATION else "cv_cross_entropy": self.loss.tolist(),
            "chosen": strengths[int(self.chosen)],
            "lowest": strengths[int(self.loss.argmin())],
        }
        entry |= {name: along(values) for name, values in scores.items()}
        if len(self.certificates):
            found = [Certificate(*numbers) for numbers in self.certificates.tolist()]
            entry["certificates"] = along([c._asdict() | {"converged": c.converged} for c in found])
        return entry

    def set_probe(self, probe: Probe) -> None:
        """Give a probe with batch norm the weights of the chosen strength."""
        norm = probe.norm
        norm.running_mean.copy_(self.mean)
        variance = self.scale.clamp(min=1e-30).pow(-2)
        norm.running_var.copy_(torch.where(self.scale > 0, variance, 1))
        chosen = self.weights[self.row].to(probe.head.weight)
        probe.head.weight.copy_(chosen * (norm.running_var + norm.eps).sqrt())
        probe.head.bias.copy_(self.bias[self.row])
