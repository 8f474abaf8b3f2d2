"""The refinement against L-BFGS on explicitly upsampled logits, from several starts, and on a sample with passes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize as scipy_minimize

from probes.ops.cross_entropy import soft_labels
from probes.ops.geometry import Geometry
from probes.training.closed_form import solve_moments
from probes.training.moments import Moments
from probes.training.optimum import Problem, dense_metric, diagonal_metric, minimise
from probes.training.refinement import Refinement
from probes.training.solver_progress import points_to_tensors, set_points
from probes.training.state_sample import StateSample

pytestmark = pytest.mark.numerics

GRID, SIZE, CLASSES, WIDTH, IMAGES = (3, 3), (12, 12), 3, 5, 24


class Model:
    """What a sample needs of a model."""

    grid, geometry, device = GRID, Geometry(GRID, 12, 12), torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """States f32[B, T, d] with a channel of tiny scale, and masks uint8[B, H, W] that they predict in part."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (IMAGES, *GRID), generator=generator)
    pixels = F.interpolate(target[:, None].float(), SIZE, mode="nearest")[:, 0].to(torch.uint8)
    pixels[:, 0, :3] = 255
    states = torch.randn(CLASSES, WIDTH, generator=generator)[target.flatten(1)]
    states = states + 1.5 * torch.randn(states.shape, generator=generator)
    states[..., 0] *= 1e-3
    return states + 2, pixels


def problem(data, strength: float, images: slice = slice(None)) -> Problem:
    states, target = data
    moments = Moments.zeros(states[0].mean(0), 1, CLASSES)
    labels = soft_labels(target[images], CLASSES, GRID)
    moments.update(states[images].flatten(0, 1), labels.flatten(0, 1), 0)
    form = solve_moments(*moments.without(None), moments.pivot)
    return Problem(form, strength, None, form)


def refinement(data, at: Problem, images: slice = slice(None)) -> Refinement:
    sample = StateSample(Model, 1, 1)
    sample.add({"site": data[0][images]}, data[1][images], 0)
    refined = Refinement(sample)
    refined.problems["site"] = [at]
    return refined


def explicit_objective(data, at: Problem, point: torch.Tensor) -> torch.Tensor:
    """Return the objective with F.interpolate and F.cross_entropy, in float64."""
    states, target = data
    weights, bias = at.space.to_states(point[:, :-1]), point[:, -1]
    logits = (states.double() - at.space.mean) @ weights.T + bias
    up = F.interpolate(logits.transpose(1, 2).unflatten(2, GRID), SIZE, mode="bilinear")
    variance = torch.where(at.space.scale > 0, at.space.scale**-2, 0)
    return F.cross_entropy(up, target.long(), ignore_index=255) + at.strength / 2 * (weights**2 * variance).sum()


def scipy_optimum(data, at: Problem) -> float:
    shape = at.point.shape

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x).view(shape).requires_grad_()
        value = explicit_objective(data, at, point)
        value.backward()
        return value.item(), point.grad.flatten().numpy()

    options = {"maxiter": 5000, "gtol": 1e-9, "ftol": 0}
    return scipy_minimize(
        value_and_gradient, np.zeros(at.point.numel()), jac=True, method="L-BFGS-B", options=options
    ).fun


@pytest.mark.parametrize("strength", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dense", [True, False])
def test_equals_scipy_on_upsampled_logits(data, strength, dense, monkeypatch):
    monkeypatch.setattr("probes.training.refinement.DENSE", 3000 if dense else 0)
    at = problem(data, strength)
    refinement(data, at).refine(whole=True)
    assert at.certificate.converged
    assert explicit_objective(data, at, at.point).item() == pytest.approx(scipy_optimum(data, at), abs=1e-5)


def test_no_curvature_is_an_error(data):
    at = problem(data, 1e-2)
    tokens = at.coordinates(data[0].flatten(0, 1) - at.space.mean.float())
    with pytest.raises(RuntimeError, match="Hessian is 0 or not finite"):
        dense_metric(at, tokens, torch.zeros(len(tokens)))


def test_objective_and_gradient_equal_the_explicit_ones(data):
    at = problem(data, 1e-2)
    refined = refinement(data, at)
    images = [(0, (data[0].double() - at.space.mean).float(), data[1])]
    point = torch.randn(at.point.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    value, gradient = refined._objective(at, images, refined.sample.labelled())(point)
    point.requires_grad_()
    expected = explicit_objective(data, at, point)
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, point.grad, rtol=1e-3, atol=1e-5)


def test_gradient_at_zero_follows_from_the_moments(data):
    at = problem(data, 1e-2)
    point = at.point.clone().requires_grad_()
    explicit_objective(data, at, point).backward()
    torch.testing.assert_close(at.gradient, point.grad, rtol=1e-4, atol=1e-6)


def test_two_starts_end_at_the_same_loss(data):
    ends = []
    for start in (0.0, 3.0):
        at = problem(data, 1e-3)
        at.point = at.point + start * torch.randn(at.point.shape, generator=torch.Generator().manual_seed(2))
        refinement(data, at).refine(whole=True)
        ends.append(explicit_objective(data, at, at.point).item())
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


def test_passes_on_a_sample_reach_the_optimum_of_all_images(data):
    """Half of the images in memory: within eight passes the certificate holds, and the point is the optimum."""
    at = problem(data, 1e-2)
    refined = refinement(data, at, slice(0, 12))
    refined.refine(whole=False)
    for _ in range(8):
        refined.add_gradients({"site": data[0]}, data[1], 0)
        refined.set_gradients()
        refined.refine(whole=False)
        if refined.converged:
            break
    assert refined.converged
    assert explicit_objective(data, at, at.point).item() == pytest.approx(scipy_optimum(data, at), abs=2e-4)
    alone = problem(data, 1e-2)
    refinement(data, alone, slice(0, 12)).refine(whole=True)
    on_sample = explicit_objective(data, alone, alone.point).item()
    assert on_sample > scipy_optimum(data, at) + 1e-3, "else the passes would not be needed"


def test_a_step_that_raises_the_loss_is_taken_back(data):
    at = problem(data, 1e-2)
    start, gradient = at.point, at.gradient
    at.point = start + 100
    at.accept(1e3, gradient + 1)
    assert at.point is start and at.gradient is gradient and at.proximal == pytest.approx(1e-2)


def test_a_resumed_refinement_takes_the_same_steps_back(data):
    """Where the first step of the resumed run is worse than the one before, but better than none."""
    at, resumed = problem(data, 1e-2), problem(data, 1e-2)
    none = at._value
    refined = refinement(data, at, slice(0, 12))
    refined.refine(whole=False)
    refined.add_gradients({"site": data[0]}, data[1], 0)
    refined.set_gradients()
    refined.refine(whole=False)
    assert set_points({"site": [resumed]}, points_to_tensors({"site": [at]}, 2)) == 2
    assert torch.equal(resumed.point, at.point) and resumed.certificate == at.certificate
    ridge, _ = at.add_ridge(0.0, at.gradient, at.point)
    for x in (at, resumed):
        x.accept((at._value + none) / 2 - ridge, torch.ones_like(x.point))
    assert at.proximal == 1e-2, "the step was not taken back"
    assert torch.equal(resumed.point, at.point) and torch.equal(resumed.gradient, at.gradient)
    assert resumed.proximal == at.proximal


def test_a_certificate_is_not_given_before_the_optimum(data, monkeypatch):
    monkeypatch.setattr("probes.training.optimum.ITERATIONS", 2)
    at = problem(data, 1e-3)
    certificate = minimise(refinement(data, at)._objective(at, _all(data, at), torch.tensor([1.0])), at)
    assert not certificate.converged
    assert diagonal_metric(at).factor.shape == (at.point.numel(),)


def _all(data, at: Problem) -> list:
    return [(0, (data[0].double() - at.space.mean).float(), data[1])]
