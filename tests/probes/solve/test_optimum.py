"""Probes at the optimum against scipy on explicitly upsampled logits, and on their path."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY, LabelSmoothing
from scipy.optimize import minimize

import probes
from llava_bidir.common.errors import UserError
from probes.ops.quadrature import PreparedMasks, prepare_masks
from probes.solve import refinement as refinements
from probes.solve import space as spaces
from probes.solve.held_out import scored_masks
from probes.solve.objective import NODES, SiteProblem
from probes.solve.refinement import refine
from probes.solve.strength_search import FIRST, HELD_OUT_GAIN, TOLERANCE, FoldSearch, half_decade
from probes.tasks.losses import CrossEntropy

pytestmark = pytest.mark.numerics

GRID = (3, 3)
SIZE = (48, 48)
CLASSES = 3
WIDTH = 5
IMAGES = 24
FOLDS = 3
FOLD_OF = torch.arange(IMAGES) // 2 % FOLDS
LONE = CLASSES  # a class that only the first fold has


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """States f32[B, T, d] with a channel of tiny scale, and masks uint8[B, H, W] that they predict in part."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, CLASSES, (IMAGES, *GRID), generator=generator)
    pixels = F.interpolate(target[:, None].float(), SIZE, mode="nearest")[:, 0].to(torch.uint8)
    pixels[:, 0, :3] = 255
    pixels[3, 20:] = 255
    states = torch.randn(CLASSES, WIDTH, generator=generator)[target.flatten(1)]
    states = states + 1.5 * torch.randn(states.shape, generator=generator)
    states[..., 0] *= 1e-3
    return states + 2, pixels


@pytest.fixture(scope="module")
def lone(data) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with another class in the middle of two images of the first fold."""
    states, target = (x.clone() for x in data)
    target[:2, 16:32] = LONE
    states[:2, 3:6] += 2
    return states, target


def problem(data, loss: CrossEntropy = CROSS_ENTROPY) -> SiteProblem:
    states, target = data
    classes = int(target[target != 255].max()) + 1

    def prepare(mask: torch.Tensor) -> PreparedMasks:
        return prepare_masks(mask, num_classes=classes, grid=GRID, nodes=NODES)

    masks = prepare(target)
    scored = scored_masks(
        masks, fold_of=FOLD_OF, target_of=lambda image: target[image], prepare=prepare
    )
    return SiteProblem(loss=loss, states=states, masks=masks, fold_of=FOLD_OF, scored=scored)


def objective(
    data, at: SiteProblem, strength: float, images=slice(None), label_smoothing: float = 0.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the objective at a point, with F.interpolate and F.cross_entropy, in float64."""
    states, target = (x[images] for x in data)
    space = at.space
    variance = torch.where(space.scale > 0, space.scale**-2, 0)

    def value(point: torch.Tensor) -> torch.Tensor:
        weights = (point[:, :-1] @ space.basis.double().T) * space.scale
        logits = (states.double() - space.mean) @ weights.T + point[:, -1]
        up = F.interpolate(logits.transpose(1, 2).unflatten(2, GRID), SIZE, mode="bilinear")
        loss = F.cross_entropy(up, target.long(), ignore_index=255, label_smoothing=label_smoothing)
        return loss + strength / 2 * (weights**2 * variance).sum()

    return value


def scipy_optimum(value: Callable, start: torch.Tensor) -> torch.Tensor:
    """Return the point where an objective is lowest."""

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(x).view_as(start).requires_grad_()
        loss = value(point)
        loss.backward()
        return loss.item(), point.grad.flatten().numpy()

    optimum = minimize(
        value_and_gradient,
        np.zeros(start.numel()),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "gtol": 1e-9, "ftol": 0},
    )
    return torch.from_numpy(optimum.x).view_as(start)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_solved_probes_equal_scipy_on_upsampled_logits(data, smoothing):
    """With another loss, too: a class and nothing else."""
    at = problem(data, LabelSmoothing(smoothing) if smoothing else CROSS_ENTROPY)
    tried, points = FoldSearch(at).choose((1.0, 1e-2, 1e-4))
    points, certificates = refine(at, torch.tensor(tried.strengths).double(), points)
    assert all(certificate.converged for certificate in certificates)
    assert tried.solved == [0, 1, 2]
    for strength, point in zip(tried.strengths, points, strict=True):
        value = objective(data, at, strength, label_smoothing=smoothing)
        expected = value(scipy_optimum(value, at.start)).item()
        assert value(point).item() == pytest.approx(expected, abs=1e-5)


def held_out_loss(data, at: SiteProblem, points) -> float:
    """Return the mean loss of the images that each fold's point was not solved on."""
    total = pixels = 0
    for fold, point in enumerate(points):
        left_out = (FOLD_OF == fold).nonzero()[:, 0]
        labelled = (data[1][left_out] != 255).sum().item()
        total += labelled * objective(data, at=at, strength=0.0, images=left_out)(point).item()
        pixels += labelled
    return total / pixels


def test_cross_validated_losses_are_those_of_folds_solved_to_the_end(data):
    """A fold sees none of the images that it is scored on; its decrease allows them `HELD_OUT_GAIN` times as much."""
    at = problem(data)
    tried, _ = FoldSearch(at).choose()
    others = [(FOLD_OF != fold).nonzero()[:, 0] for fold in range(FOLDS)]
    for strength, loss in zip(tried.strengths, tried.loss, strict=True):
        values = [objective(data, at=at, strength=strength, images=images) for images in others]
        points = [scipy_optimum(value, at.start) for value in values]
        expected = held_out_loss(data, at, points)
        assert loss == pytest.approx(expected, abs=HELD_OUT_GAIN * TOLERANCE), strength


def test_a_class_that_one_fold_alone_has_is_trained_on_and_not_tested(lone):
    """Its pixels take no part in the choice of the strength."""
    at = problem(lone)
    states, target = lone
    shape = (FOLDS, LONE + 1, WIDTH + 1)
    points = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    expected = held_out_loss((states, target.masked_fill(target == LONE, 255)), at, points)
    assert at.held_out_loss(points) == pytest.approx(expected, rel=1e-4)
    assert at.pixels.sum() == (target != 255).sum()
    probe = at.space.to_states(points[:1])
    trained, tested = (
        at.sums(0, probe, masks, needs_grad=False)[0] for masks in (at.masks, at.scored_masks)
    )
    assert trained > tested


def test_probes_of_all_images_start_from_folds_that_know_the_class(lone):
    search = FoldSearch(problem(lone))
    _, points = search.choose((1e-2,))
    of_folds = search.visited[1e-2].minimum.points
    expected = of_folds.mean(0)
    expected[LONE] = of_folds[1:, LONE].mean(0)
    torch.testing.assert_close(points[0], expected)


def test_classes_of_one_fold_each_are_an_error(data):
    masks = [np.full(SIZE, image % 2, np.uint8) for image in range(12)]
    with pytest.raises(UserError, match="each class is labelled in only one of 2 folds"):
        probes.solve_features(data[0][:12].unflatten(1, GRID), masks, 2, folds=2)


def test_the_search_ends_where_the_loss_has_risen_with_neighbours_on_both_sides(data):
    tried, _ = FoldSearch(problem(data)).choose()
    assert tried.strengths == sorted(tried.strengths, reverse=True)
    assert tried.loss[tried.chosen] == min(tried.loss)
    assert tried.solved == [tried.chosen + i for i in (-1, 0, 1)]
    assert tried.loss[-1] > tried.loss[tried.chosen] < tried.loss[0]
    ratio = np.divide(tried.strengths[:-1], tried.strengths[1:])
    np.testing.assert_allclose(ratio, 10**0.5, rtol=1e-6)


def test_a_close_choice_ends_where_rounding_allows_no_smaller_decrease(data, monkeypatch):
    minimise = FoldSearch._minimise
    calls = []

    def stuck(self, strength, *args, **kwargs):
        calls.append(strength)
        assert len(calls) < 100, "the search goes on for ever"
        minimum = minimise(self, strength, *args, **kwargs)
        return minimum._replace(decrease=torch.ones_like(minimum.decrease))

    monkeypatch.setattr(FoldSearch, "_minimise", stuck)
    tried, _ = FoldSearch(problem(data)).choose()
    assert tried.loss[tried.chosen] == min(tried.loss)


def test_states_that_tell_nothing_need_more_regularisation_than_the_first_strength(data):
    noise = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(3))
    tried, _ = FoldSearch(problem((noise, data[1]))).choose()
    assert tried.strengths[0] > half_decade(FIRST), "stronger ones were tried"
    assert 0 < tried.chosen < len(tried.strengths) - 1


def test_a_certificate_is_not_given_before_the_optimum(data, monkeypatch):
    monkeypatch.setattr(refinements, "ROUNDS", 1)
    monkeypatch.setattr(refinements, "TOLERANCE", 10.0)  # of the decrease: no step is taken
    monkeypatch.setattr(refinements, "GRADIENT", 1e3)
    at = problem(data)
    _, (certificate,) = refine(at, torch.tensor([1e-3]).double(), at.start[None] + 1)
    assert not certificate.converged
    assert certificate.decrease > 1e-2


def test_chunks_of_images_give_the_sums_of_all(data, monkeypatch):
    """States of half precision are used as they are."""
    at = problem((data[0].half(), data[1]))
    two = torch.randn(2, CLASSES, WIDTH + 1, dtype=torch.float64)
    whole = at.sums(1, two, at.masks)
    monkeypatch.setitem(spaces.CHUNK_NUMEL, "cpu", 1)  # one image at a time
    torch.testing.assert_close(at.sums(1, two, at.masks), whole, rtol=1e-4, atol=1e-2)
