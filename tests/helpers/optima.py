"""Compare probes that were solved in two ways: what a certificate promises, and nothing else.

A certificate bounds what the objective can still gain. Along flat directions weights are free, so that two processors,
two numbers of threads or two solvers end at other weights. They have in common:

- the objective: that of each probe is at most the other one's, and what its own certificate leaves;
- the predicted class, but where the two best logits are closer than the certificates allow;
- the chosen strength, and the losses of left-out images.

Weights themselves are compared only where the same code runs on the same shapes in the same process layout.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from probes.ops.geometry import GridPlacement
from probes.runs.read import ProbeRun
from probes.solve.strength_search import HELD_OUT_GAIN, TOLERANCE

# Of a loss in nats: the quadrature of five nodes is exact to five digits, and probes are stored in float32.
ROUNDING = 1e-5
# A certificate is the decrease that a model of the curvature predicts for the next step. The model is a sample.
SLACK = 3

Point = Tensor  # f64[K, d + 1], weights and biases of states


def assert_same_optimum(
    value: Callable[[Point], Tensor], a: Point, b: Point, left: tuple[float, float], states: Tensor
) -> None:
    """Raise unless two points are the optimum of one convex objective as far as their certificates say.

    Args:
        value: The objective, differentiable.
        a: One point.
        b: The other one.
        left: Decreases of both, in nats.
        states: f[n, d], where predicted classes are compared.
    """
    allowed = [SLACK * decrease + ROUNDING for decrease in left]
    at_a, at_b = (value(point).item() for point in (a, b))
    assert at_a - at_b <= allowed[0], f"{at_a} is {at_a - at_b} above the other optimum"
    assert at_b - at_a <= allowed[1], f"{at_b} is {at_b - at_a} above the other optimum"
    inputs = torch.cat([states.double(), torch.ones(len(states), 1).double()], 1)
    classes = [(inputs @ point.T).argmax(1) for point in (a, b)]
    differ = (classes[0] != classes[1]).nonzero().flatten().tolist()
    if not differ:
        return
    hessian = torch.func.hessian(lambda x: value(x.view_as(a)))(a.flatten())
    inverse = torch.linalg.pinv(hessian, hermitian=True)  # all biases together are free
    for i in differ:
        direction = torch.zeros_like(a)
        direction[classes[0][i]] += inputs[i]
        direction[classes[1][i]] -= inputs[i]
        margin = (direction * a).sum().item()
        # how far this difference of logits can move while the objective rises by what is allowed
        reach = (2 * sum(allowed) * direction.flatten() @ inverse @ direction.flatten()) ** 0.5
        assert margin <= reach, f"class {classes[0][i]} leads by {margin}, {reach} is free"


def assert_same_solution(
    one: ProbeRun, other: ProbeRun, held_out: float = 2 * HELD_OUT_GAIN * TOLERANCE
) -> None:
    """Raise unless two runs of `probes solve` on the same images have found the same, as far as their certificates say.

    Args:
        one: A run.
        other: The other one.
        held_out: How far the losses of left-out images may be apart, in nats.
    """
    mllm = one.mllm()
    samples = [*one.dataset("training")]
    states = mllm.states(mllm.preprocess([sample["image"] for sample in samples]), other.sites)
    targets = [torch.tensor(sample["target"]).long() for sample in samples]
    for target in targets:
        size = tuple(target.shape)
        assert mllm.geometry.view(size) == GridPlacement.full(size), "as F.interpolate"
    labelled = sum((target != 255).sum() for target in targets)

    def objective(site: str, strength: float) -> Callable[[Point], Tensor]:
        """Return the penalised loss of a site with F.interpolate and F.cross_entropy, in float64."""
        inputs = states[site].double()
        variance = one.probes()[site].norm.running_var.double()

        def value(point: Point) -> Tensor:
            logits = inputs @ point[:, :-1].T + point[:, -1]
            grids = logits.transpose(1, 2).unflatten(2, mllm.grid)
            total = 0
            for logits_of_image, target in zip(grids, targets, strict=True):
                up = F.interpolate(logits_of_image[None], target.shape, mode="bilinear")
                total += F.cross_entropy(up, target[None], ignore_index=255, reduction="sum")
            penalty = (point[:, :-1].square() * variance).sum()
            return total / labelled + strength / 2 * penalty

        return value

    for site in other.sites:
        ours, theirs = (_entry(run, site) for run in (one, other))
        assert ours["chosen"] == theirs["chosen"], site
        losses = [
            dict(zip(x["strengths"], x["cv_cross_entropy"], strict=True)) for x in (ours, theirs)
        ]
        for strength in losses[0].keys() & losses[1].keys():
            expected = pytest.approx(losses[1][strength], abs=held_out)
            assert losses[0][strength] == expected, (site, strength)
        points, left = zip(*(_solved(run, site) for run in (one, other)), strict=True)
        value = objective(site, ours["chosen"])
        assert_same_optimum(value, *points, left, states[site].flatten(0, 1)[::7])


def _entry(run: ProbeRun, site: str) -> dict:
    return next(entry for entry in run.strengths.sites if entry["site"] == site)


def _solved(run: ProbeRun, site: str) -> tuple[Point, float]:
    """Return the probe of a site, and the decrease that its certificate leaves."""
    probe = run.probes()[site]
    norm = probe.norm
    weight = probe.head.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = probe.head.bias.double() - weight @ norm.running_mean.double()
    entry = _entry(run, site)
    certificate = entry["certificates"][entry["strengths"].index(entry["chosen"])]
    assert certificate["converged"], site
    return torch.cat([weight, bias[:, None]], 1).detach(), certificate["decrease"]
