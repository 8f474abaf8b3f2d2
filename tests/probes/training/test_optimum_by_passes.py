"""Probes whose images do not fit: the optimum and the strength of all images, from a few pixels of each."""

import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY, LabelSmoothing

from probes.ops.geometry import GridPlacement
from probes.ops.quadrature import prepare_masks
from probes.run_config import SolverOptions
from probes.training.solve import curvature
from probes.training.solve.curvature import (
    FIRST_DAMPING,
    LEAST_DAMPING,
    MOST_FIRST_DAMPING,
    SampledPixels,
    SampleHessian,
)
from probes.training.solve.moments import Moments, SiteSpace
from probes.training.solve.objective import (
    LOOSE_NODES,
    STRONGEST,
    TIGHT_NODES,
    WEAKEST,
    PixelProblem,
    SiteProblem,
    half_decades,
)
from probes.training.solve.pass_refinement import (
    PassRefinement,
    pack_refinement,
    unpack_refinement,
)
from probes.training.solve.pass_sums import PassSums, null_gradient
from probes.training.solve.pixel_sample import AxisRange, Pixels, choose_pixels
from probes.training.solve.refinement import start_refinement
from probes.training.solve.strength_path import HELD_OUT_GAIN, FoldSearch

pytestmark = pytest.mark.numerics

GRID = (6, 6)
SIZE = (36, 36)
CLASSES = 3
WIDTH = 12
IMAGES = 120
FOLDS = 3


class Data:
    """Images whose tokens resemble each other, as those of photos do: each has an offset of its own."""

    def __init__(self):
        self.loss = CROSS_ENTROPY
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randint(0, CLASSES, (IMAGES, 1, 3, 3), generator=generator).float()
        tokens = F.interpolate(coarse, GRID)[:, 0].long()
        self.target = F.interpolate(coarse, SIZE)[:, 0].to(torch.uint8)
        self.target[::3, :5] = 255
        means = torch.randn(CLASSES, WIDTH, generator=generator)
        noise = torch.randn(IMAGES, GRID[0] * GRID[1], WIDTH, generator=generator)
        offset = 2 * torch.randn(IMAGES, 1, WIDTH, generator=generator)
        self.states = means[tokens.flatten(1)] + 1.5 * noise + offset + 2
        self.states *= torch.linspace(0.01, 3, WIDTH)
        self.fold_of = torch.arange(IMAGES) // 4 % FOLDS
        self.tight = prepare_masks(self.target, CLASSES, GRID, TIGHT_NODES)
        self.loose = prepare_masks(self.target, CLASSES, GRID, LOOSE_NODES)
        self.moments = Moments.zeros(self.states[0].mean(0), 1, CLASSES)
        labels = self.tight.soft.flatten(2).mT.flatten(0, 1).double()
        self.moments.update(self.states.flatten(0, 1), labels, 0)
        self.space = SiteSpace.of_moments(self.moments)

    def sample(self, count: int, seed: int) -> tuple[SampledPixels, torch.Tensor]:
        """Return about `count` pixels of all images as they are stored, and their labels."""
        inputs = []
        labels = []
        weights = []
        folds = []
        for image, target in enumerate(self.target):
            mine = (image + 1) * count // IMAGES - image * count // IMAGES
            view = GridPlacement.full(SIZE)
            tokens, shares, label, pixels = choose_pixels(
                target,
                mine,
                seed * IMAGES + image,
                GRID,
                view,
            )
            inputs.append((self.states[image][tokens] * shares[..., None]).sum(1))
            labels.append(label)
            weights.append(torch.full((len(label),), pixels / max(1, len(label))))
            folds.append(self.fold_of[image].expand(len(label)))
        states = torch.cat(inputs)
        axes = AxisRange.of(self.space, self.space.coordinates(states))
        kept = axes.coordinates_of(axes.store(states))
        return SampledPixels(kept, torch.cat(weights), torch.cat(folds)), torch.cat(labels)

    def whole(self, strengths=None):
        """Return the path and the refinement with all images in memory."""
        problem = SiteProblem(self.loss, self.states, self.loose, self.tight, self.fold_of)
        path, refinement = start_refinement(problem, strengths)
        refinement.solve_in_memory()
        return path, refinement

    def start(self, count: int, strengths=None) -> PassRefinement:
        """Return what the first pass ends with."""
        sample, labels = self.sample(count, 0)
        problem = PixelProblem(
            self.space,
            self.loss,
            sample.inputs,
            labels,
            sample.weights.double(),
            sample.folds,
            FOLDS,
        )
        found = FoldSearch(problem).solve(strengths)
        chosen = found.path.chosen
        points = torch.cat([found.fold_points, found.points[found.path.solved.index(chosen)][None]])
        null = null_gradient(self.loss, self.space, self.moments)
        return PassRefinement.start(
            self.loss,
            self.space,
            null,
            found.path.strengths[chosen],
            points,
            strengths,
        )

    def take_pass(self, refinement: PassRefinement) -> None:
        """Give a refinement the exact sums of all images, in batches of mixed folds."""
        sums = PassSums(self.loss, *refinement.arguments())
        for images in torch.arange(IMAGES).split(50):
            masks = self.tight[images.tolist()]  # no class is in one fold only
            sums.add(self.states[images], masks, masks, self.fold_of[images].tolist())
        pixels = torch.stack(
            [self.tight.pixels[self.fold_of == fold].sum() for fold in range(FOLDS)]
        )
        refinement.accept_losses(*sums.means(self.space, pixels))


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def product_dtype(request, monkeypatch):
    """The dtype of a sample's products, whatever this machine is fast in."""
    monkeypatch.setattr(curvature, "fast_dtype", lambda device: request.param)


@pytest.mark.parametrize(("share", "passes"), [(0.08, 8), (0.02, 8), (0.005, 10)])
def test_a_small_share_of_the_bytes_ends_at_the_optimum_and_the_strength_of_all_images(
    data, share, passes, product_dtype
):
    """Half a byte a channel, against four for all states; few whole images would choose too strong."""
    path, whole = data.whole()
    count = int(share * IMAGES * GRID[0] * GRID[1] * 8)
    refinement = data.start(count // 2)
    for number in range(2, passes + 1):
        data.take_pass(refinement)
        refinement.step(data.sample(count, number)[0])
        if refinement.converged:
            break
    assert refinement.converged and len(refinement.certificates) == 3
    found = refinement.window.path()
    ratio = found.strengths[found.chosen] / path.strengths[path.chosen]
    assert 0.3 < ratio < 3.5, "the same strength or its neighbour"
    losses = dict(zip(path.strengths, path.loss, strict=True))
    for strength, loss in zip(found.strengths, found.loss, strict=True):
        near = [known for other, known in losses.items() if other == pytest.approx(strength)]
        if strength in refinement.window.strengths and near:
            assert loss == pytest.approx(near[0], abs=3e-3)
    for strength, point in zip(refinement.window.strengths, refinement.points, strict=True):
        rows = [
            i
            for i, other in enumerate(whole.strengths.tolist())
            if other == pytest.approx(strength)
        ]
        if rows:
            value = whole.problem.objective(whole.strengths[rows], [None], TIGHT_NODES)(
                point[None], [0]
            )[0].item()
            assert value == pytest.approx(whole.accepted.value[rows[0]].item(), abs=2e-4)


def test_another_loss_ends_at_its_own_optimum(data, monkeypatch):
    """Its class is all that is written."""
    plain, _ = data.whole((1e-2,))
    monkeypatch.setattr(data, "loss", LabelSmoothing(0.2))
    path, whole = data.whole((1e-2,))
    assert path.loss[0] > plain.loss[0] + 0.05
    refinement = data.start(2000, (1e-2,))
    for number in range(2, 10):
        data.take_pass(refinement)
        refinement.step(data.sample(2000, number)[0])
        if refinement.converged:
            break
    assert refinement.converged
    torch.testing.assert_close(
        refinement.probes.accepted.value[0], whole.accepted.value, atol=2e-4, rtol=0
    )


def test_gradient_at_zero_and_sums_of_a_pass_are_those_of_all_images(data):
    problem = SiteProblem(data.loss, data.states, data.loose, data.tight, data.fold_of)
    strengths = torch.tensor([0.0]).double()
    expected = problem.objective(strengths, [None], TIGHT_NODES)(problem.start[None], [0])[1][0]
    torch.testing.assert_close(
        null_gradient(data.loss, data.space, data.moments), expected, atol=1e-5, rtol=1e-4
    )
    generator = torch.Generator().manual_seed(1)
    points = (
        problem.start
        + 0.1 * torch.randn(FOLDS + 1, *problem.start.shape, generator=generator).double()
    )
    refinement = PassRefinement.start(data.loss, data.space, expected, 0.1, points, (0.1,))
    data.take_pass(refinement)
    strengths = torch.full((FOLDS + 1,), 0.1).double()
    left_out = [*range(FOLDS), None]
    value, gradient = problem.objective(strengths, left_out, TIGHT_NODES)(
        points, list(range(FOLDS + 1))
    )
    torch.testing.assert_close(refinement.probes.accepted.value[0], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        refinement.probes.accepted.gradient[0], gradient, atol=1e-5, rtol=1e-3
    )
    assert refinement.window.losses[0.1] == pytest.approx(
        problem.held_out_loss(points[:-1]), rel=1e-5
    )


@pytest.mark.parametrize("bias_gradient", [0.0, 0.2])
def test_sample_hessian_is_the_derivative_of_the_gradient(data, product_dtype, bias_gradient):
    sample, labels = data.sample(400, 3)
    problem = PixelProblem(
        data.space,
        data.loss,
        sample.inputs,
        labels,
        sample.weights.double(),
        sample.folds,
        FOLDS,
    )
    generator = torch.Generator().manual_seed(2)
    points = 0.3 * torch.randn(2, CLASSES, WIDTH + 1, generator=generator).double()
    direction = torch.randn(points.shape, generator=generator).double()
    strengths = torch.tensor([1e-2, 1e-2]).double()
    left_out = [1, None]

    def gradient(x):
        return problem.objective(strengths, left_out, TIGHT_NODES)(x, [0, 1])[1]

    expected = (gradient(points + 1e-2 * direction) - gradient(points - 1e-2 * direction)) / 2e-2
    spectrum = torch.cat([data.space.spectrum, torch.ones(1)])
    hessian = SampleHessian(
        data.loss,
        sample,
        points,
        bias_gradient * direction,
        left_out,
        data.space.ridge(strengths)[0, 0],
        spectrum,
        torch.tensor([0.3, 0.3]).double(),
    )
    product = hessian.times(direction) - hessian.pull * direction
    torch.testing.assert_close(product, expected, atol=1e-3, rtol=1e-2)
    solved = hessian.solve(direction, residual=0.03)
    assert (hessian.times(solved) - direction).norm() < 0.1 * direction.norm()
    pull = 0.3 * hessian.typical + (bias_gradient * direction[..., -1:]).abs() * spectrum
    torch.testing.assert_close(hessian.pull, pull)


def test_a_step_that_raises_the_loss_is_taken_back(data):
    refinement = data.start(400, (1e-1, 1e-2))
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    before = refinement.probes.accepted.points.clone()
    value = refinement.probes.accepted.value.clone()
    damping = refinement.probes.damping.clone()
    losses = dict.fromkeys(
        refinement.window.strengths, refinement.window.losses[refinement.window.best]
    )
    refinement.probes.points = refinement.probes.points + 100
    data.take_pass(refinement)
    assert torch.equal(refinement.probes.accepted.points, before) and torch.equal(
        refinement.probes.accepted.value, value
    )
    assert refinement.window.losses == losses, (
        "the cross-validated loss, too, is that of the points that are kept"
    )
    assert (refinement.probes.damping == 10 * damping).all()
    refinement.step(data.sample(400, 2)[0])
    data.take_pass(refinement)
    assert (refinement.probes.accepted.value < value).all()
    assert (refinement.probes.damping < 10 * damping).all(), "the next step was taken"


def test_a_damped_step_is_shorter(data):
    lengths = []
    for damping in (LEAST_DAMPING, 100 * LEAST_DAMPING):
        refinement = data.start(400, (1e-1, 1e-2))
        data.take_pass(refinement)
        refinement.probes.damping[:] = damping
        refinement.step(data.sample(400, 1)[0])
        lengths.append((refinement.probes.points - refinement.probes.accepted.points).norm())
    assert lengths[1] < 0.8 * lengths[0]


@pytest.mark.parametrize(("count", "expected"), [(13, 1.5), (1, 3.0), (10_000, LEAST_DAMPING)])
def test_the_first_step_is_damped_by_the_weights_for_each_pixel(data, count, expected):
    refinement = data.start(400, (1e-1, 1e-2))
    sample = SampledPixels(torch.ones(count, WIDTH + 1), torch.ones(count), torch.zeros(count))
    refinement._start_damping(sample)
    assert FIRST_DAMPING * CLASSES * (WIDTH + 1) / 13 == 1.5 and MOST_FIRST_DAMPING == 3
    assert (refinement.probes.damping == expected).all()
    refinement._start_damping(sample)
    assert (refinement.probes.damping == expected).all(), "only the first time"


@pytest.mark.parametrize(("gain", "factor"), [(-0.5, 10), (0.1, 3), (0.5, 1), (1.0, 1 / 3)])
def test_damping_follows_what_a_step_has_gained_of_what_was_promised(data, gain, factor):
    refinement = data.start(400, (1e-1, 1e-2))
    refinement.probes.accepted.value[:] = 0.7
    refinement.probes.decrease[:] = 0.1
    refinement.probes.damping[:] = 1.0
    refinement._adapt_damping(refinement.probes.accepted.value - gain * 0.1)
    torch.testing.assert_close(
        refinement.probes.damping, torch.full_like(refinement.probes.accepted.value, factor)
    )


def test_a_point_is_taken_for_the_strength_whose_value_it_lowers_most(data):
    """The point of the stronger penalty is put where that of the weaker one should be, and the other way round."""
    refinement = data.start(400, (1e-1, 1e-3))
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    data.take_pass(refinement)
    value = refinement.probes.accepted.value.clone()
    kept = refinement.probes.accepted.points.clone()
    gradient = refinement.probes.accepted.gradient.clone()
    held_out = refinement.probes.held_out.clone()
    refinement.probes.accepted.value.add_(1)
    refinement.probes.points = kept.flip(0)
    data.take_pass(refinement)
    torch.testing.assert_close(refinement.probes.accepted.value, value)
    torch.testing.assert_close(refinement.probes.accepted.gradient, gradient)
    torch.testing.assert_close(refinement.probes.held_out, held_out)
    assert torch.equal(refinement.probes.accepted.points, kept)


def test_a_class_that_the_sample_misses_does_not_run_away(data):
    """A fold lacks a class, which has a probability on a few pixels only, and none of those is in the sample.

    Where a bias alone has a gradient, its curvature is about as much, and a Newton step is about one.
    """
    sample, _ = data.sample(400, 1)
    points = torch.zeros(1, CLASSES, WIDTH + 1).double()
    points[0, 2, -1] = -30
    gradient = torch.zeros_like(points)
    gradient[0, 2, -1] = 1e-3
    hessian = SampleHessian(
        data.loss,
        sample,
        points,
        gradient,
        [0],
        data.space.ridge(torch.tensor([1e-3]).double())[0],
        data.space.input_spectrum,
        torch.tensor([LEAST_DAMPING]).double(),
    )
    step = hessian.solve(gradient, residual=1e-3)
    assert step.abs().max().item() == pytest.approx(1, abs=0.1)
    assert step[0, 2, -1] == step.abs().max()


def test_pairs_of_a_neighbour_are_those_of_the_own_penalty(data):
    """On a quadratic function the changes of a gradient are exact at every strength."""
    refinement = data.start(400, (1e-1, 1e-2, 1e-3))
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    ridge = refinement._ridge()
    step = torch.randn(ridge.shape[0], FOLDS + 1, CLASSES, WIDTH + 1)
    refinement.probes.pairs = [(step, ((2 + ridge) * step).float())]
    for row, rows in ((0, [1, 0]), (1, [0, 2, 1]), (2, [1, 2])):
        pairs = refinement._pairs_near(row)
        assert len(pairs) == len(rows)
        for (own_step, change, _), other in zip(pairs, rows, strict=True):
            assert torch.equal(own_step, step[other])
            expected = ((2 + ridge[row]) * step[other]).float()
            torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5)


def test_the_strength_is_settled_when_its_neighbours_cannot_catch_up(data):
    refinement = data.start(400)
    for seed in (1, 2):
        data.take_pass(refinement)
        refinement.step(data.sample(400, seed)[0])
    best = refinement.window.strengths[2]
    refinement.window.best = best
    refinement.window.losses |= {strength: 1.0 for strength in refinement.window.strengths} | {
        best: 0.5
    }
    refinement.probes.decrease[:] = 1e-6
    enough = 0.5 / (2 * HELD_OUT_GAIN)
    refinement.probes.decrease[3] = 1.1 * enough
    refinement._settle()
    assert not refinement.window.settled, "left-out images may gain more than a neighbour is behind"
    refinement.probes.decrease[3] = 0.9 * enough
    refinement.probes.decrease[2] = 1.1 * enough
    refinement._settle()
    assert not refinement.window.settled, "left-out images may lose more than the best one is ahead"
    refinement.probes.decrease[2] = 1e-6
    refinement._settle()
    assert refinement.window.settled and len(refinement.window.strengths) == 3


@pytest.mark.parametrize(("decrease", "settled"), [(1e-5, False), (2e-6, True)])
def test_a_close_choice_waits_until_its_folds_have_converged(data, decrease, settled):
    """5e-5 nats apart, and at the end too close to tell, which no pass would change."""
    refinement = data.start(400)
    for seed in (1, 2):
        data.take_pass(refinement)
        refinement.step(data.sample(400, seed)[0])
    weaker = refinement.window.strengths[3]
    refinement.window.best = refinement.window.strengths[2]
    refinement.window.losses |= {strength: 1.0 for strength in refinement.window.strengths}
    refinement.window.losses |= {refinement.window.best: 0.5, weaker: 0.50005}
    refinement.probes.decrease[:] = decrease
    refinement._settle()
    assert refinement.window.settled == settled


def test_uncertainty_is_that_of_the_probe_of_all_images_at_the_pixel(data):
    refinement = data.start(400, (1e-1, 1e-2, 1e-3))
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    sums = PassSums(data.loss, *refinement.arguments())
    view = GridPlacement.full(SIZE)
    tokens, shares, labels, _ = choose_pixels(data.target[5], 50, 0, GRID, view)
    pixels = Pixels(tokens, shares, labels, torch.ones(50).double(), torch.full((50,), 5))
    found = sums.uncertainty(data.states[5:6], pixels)
    inputs = data.space.coordinates(pixels.interpolate(data.states[5:6]))
    probability = (inputs.double() @ refinement.probes.points[1, -1].T).softmax(1)
    expected = (probability * (1 - probability)).sum(1)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("end", [STRONGEST, WEAKEST])
def test_the_strength_is_settled_at_an_end_of_the_grid_too(data, end):
    refinement = data.start(400)
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    first = STRONGEST if end == STRONGEST else WEAKEST - 4
    refinement.window.strengths = [*half_decades(first, first + 4)]
    lowest = refinement.window.strengths[0 if end == STRONGEST else -1]
    refinement.window.losses = {strength: 1.0 for strength in refinement.window.strengths} | {
        lowest: 0.5
    }
    refinement.window.best = refinement.window.strengths[refinement.window.chosen]
    assert refinement.window.best != lowest, "a chosen strength has two neighbours"
    refinement.probes.decrease[:] = 1e-6
    refinement._settle()
    assert refinement.window.settled and lowest in refinement.window.strengths


def test_probes_that_have_converged_do_not_move(data):
    """A step below the resolution of float32 is noise, and so would be what it says of the curvature."""
    refinement = data.start(800)
    for seed in range(1, 9):
        data.take_pass(refinement)
        refinement.step(data.sample(800, seed)[0])
    assert refinement.converged
    before = refinement.probes.accepted.points.clone()
    for seed in range(9, 29):
        data.take_pass(refinement)
        refinement.step(data.sample(800, seed)[0])
        assert refinement.converged
    torch.testing.assert_close(refinement.probes.accepted.points, before, atol=1e-3, rtol=1e-2)
    assert torch.equal(refinement.probes.points, refinement.probes.accepted.points)


def test_a_broken_point_is_taken_back_and_spoils_no_other_strength(data):
    refinement = data.start(400, (1e-1, 1e-2))
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    damping = refinement.probes.damping.clone()
    value = refinement.probes.accepted.value.clone()
    refinement.probes.points[1] = torch.nan
    data.take_pass(refinement)
    assert (refinement.probes.accepted.value[0] < value[0]).all() and (
        refinement.probes.damping[1] == 10 * damping[1]
    ).all()
    refinement.step(data.sample(400, 2)[0])
    assert (
        refinement.probes.points.isfinite().all()
        and refinement.probes.accepted.points.isfinite().all()
    )
    data.take_pass(refinement)
    assert (refinement.probes.accepted.value < value).all()


def test_given_strengths_are_settled_when_all_have_converged(data):
    """Their cross-validated losses are reported as those at the optimum."""
    refinement = data.start(400, (1e-1, 1e-2, 1e-3))
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    refinement.window.best = refinement.window.strengths[1]
    refinement.window.losses |= {strength: 1.0 for strength in refinement.window.strengths}
    refinement.window.losses[refinement.window.strengths[1]] = 0.5
    refinement.probes.decrease[:] = 1e-6
    refinement.probes.decrease[0] = 0.01
    found = refinement.probes.accepted.gradient
    refinement.probes.accepted = refinement.probes.accepted._replace(
        gradient=torch.zeros_like(found)
    )
    refinement._settle()
    assert not refinement.window.settled, "folds of a strength that is far behind"
    refinement.probes.decrease[0] = 1e-6
    refinement.probes.accepted = refinement.probes.accepted._replace(gradient=found)
    refinement._settle()
    assert not refinement.window.settled, "probes of all images have no certificates"
    refinement.probes.accepted = refinement.probes.accepted._replace(
        gradient=torch.zeros_like(found)
    )
    refinement._settle()
    assert refinement.window.settled


def test_probes_that_have_stopped_early_do_not_move_the_window(data):
    """Weak strengths score well before their optimum, at which they are worse."""
    refinement = data.start(400)
    for seed in (1, 2):
        data.take_pass(refinement)
        refinement.step(data.sample(400, seed)[0])
    weakest = min(refinement.window.strengths)
    refinement.window.losses |= {strength: 1.0 for strength in refinement.window.strengths} | {
        weakest: 0.5
    }
    for left, moves in ((0.05, False), (0.005, True)):
        refinement.probes.decrease[refinement.window.strengths.index(weakest)] = left
        assert (min(refinement.window.next_strengths(refinement._left())) < weakest) == moves


@pytest.mark.parametrize(("behind", "moves"), [(0.0, False), (0.005, False), (0.02, True)])
def test_probes_that_have_stopped_early_move_the_window_to_stronger_ones(data, behind, moves):
    """That makes weak strengths look better, not worse; right after they have entered, all are alike."""
    refinement = data.start(400)
    for seed in (1, 2):
        data.take_pass(refinement)
        refinement.step(data.sample(400, seed)[0])
    strongest = max(refinement.window.strengths)
    others = dict.fromkeys(refinement.window.strengths, 1.0 + behind)
    refinement.window.losses |= others | {strongest: 1.0}
    refinement.probes.decrease[:] = 0.05
    assert (max(refinement.window.next_strengths(refinement._left())) > strongest) == moves
    refinement.window.losses |= {strongest: 2.0}
    assert refinement.window.next_strengths(refinement._left()) == refinement.window.strengths


def test_a_start_at_a_far_too_weak_strength_finds_that_of_all_images(data):
    """Few pixels may ask for less than all images, as with Gaussian classes of 512 channels, by a decade."""
    path, _ = data.whole()
    count = int(0.02 * IMAGES * GRID[0] * GRID[1] * 8)
    sampled = data.start(count)
    refinement = PassRefinement.start(
        data.loss,
        data.space,
        sampled.null_gradient,
        path.strengths[path.chosen] * 1e-4,
        sampled.probes.points[0],
        None,
    )
    for number in range(2, SolverOptions.passes + 1):
        data.take_pass(refinement)
        refinement.step(data.sample(count, number)[0])
        if refinement.converged:
            break
    assert refinement.converged
    ratio = refinement.window.strengths[refinement.window.chosen] / path.strengths[path.chosen]
    assert 0.3 < ratio < 3.5, "the same strength or its neighbour"


@pytest.mark.parametrize(("left", "kept"), [(0.05, False), (0.005, True)])
def test_losses_of_probes_that_have_stopped_early_leave_with_them(data, left, kept):
    """They may be lower than at the optimum, and the path would be lowest there."""
    refinement = data.start(400)
    for seed in (1, 2):
        data.take_pass(refinement)
        refinement.step(data.sample(400, seed)[0])
    before = refinement.window.strengths
    refinement.window.losses |= dict.fromkeys(before, 1.1) | {max(before): 1.0}
    refinement.probes.decrease[:] = left
    refinement._move_window()
    gone = set(before) - set(refinement.window.strengths)
    assert len(gone) == 2
    assert gone.issubset(refinement.window.losses) == kept
    assert gone.isdisjoint(refinement.window.losses) != kept
    assert set(before) & set(refinement.window.strengths) <= refinement.window.losses.keys()


def test_a_strength_that_enters_the_window_has_the_value_and_gradient_of_its_own_penalty(data):
    refinement = data.start(400)
    data.take_pass(refinement)
    refinement.step(data.sample(400, 1)[0])
    value = refinement.probes.accepted.value.clone()
    gradient = refinement.probes.accepted.gradient.clone()
    kept = refinement.probes.accepted.points.clone()
    refinement.probes.points = kept
    refinement.probes.accepted = refinement.probes.accepted._replace(
        value=torch.full_like(value, torch.inf)
    )
    data.take_pass(refinement)
    torch.testing.assert_close(refinement.probes.accepted.value, value)
    torch.testing.assert_close(refinement.probes.accepted.gradient, gradient)


@pytest.mark.parametrize("passes", [2, 3, 4])
def test_every_loss_that_is_reported_was_measured(data, passes):
    """After the last pass no strength enters the window; its loss would be that of its neighbour."""
    refinement = data.start(200)
    measured = {}
    for number in range(2, passes + 1):
        data.take_pass(refinement)
        measured |= dict(
            zip(
                refinement.window.strengths, refinement.probes.held_out.sum(1).tolist(), strict=True
            )
        )
        refinement.step(data.sample(200, number)[0], is_last=number == passes)
    found = refinement.window.path()
    assert dict(zip(found.strengths, found.loss, strict=True)) == measured
    chosen = found.strengths[found.chosen]
    assert chosen in (min(measured, key=measured.get), *refinement.window.strengths[1:-1])
    solved = [found.strengths[i] for i in found.solved]
    assert chosen in solved
    assert len(solved) == len(refinement.points) == (1 if passes == 2 else 3)


def test_state_resumes_to_the_same_numbers(data):
    refinement = data.start(300)
    for number in range(1, 3):
        data.take_pass(refinement)
        refinement.step(data.sample(300, number)[0])
    again = unpack_refinement(pack_refinement(refinement), data.loss, None)
    for one in (refinement, again):
        data.take_pass(one)
        one.step(data.sample(300, 3)[0])
    assert (
        torch.equal(refinement.probes.points, again.probes.points)
        and refinement.window.losses == again.window.losses
    )
    assert refinement.certificates == again.certificates
