"""Probes whose images do not fit: the optimum and the strength of all images, from a few pixels of each."""

import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY, LabelSmoothing

from probes.ops.geometry import GridPlacement
from probes.ops.quadrature import prepare_masks
from probes.run_config import SolverOptions
from probes.solve import curvature
from probes.solve.curvature import (
    SampledPixels,
    SampleHessian,
)
from probes.solve.moments import Moments, SiteSpace
from probes.solve.objective import (
    LOOSE_NODES,
    TIGHT_NODES,
    PixelProblem,
    SiteProblem,
    half_decades,
)
from probes.solve.pass_refinement import (
    PassRefinement,
)
from probes.solve.pass_sums import PassSums, null_gradient
from probes.solve.pixel_sample import AxisRange, choose_pixels
from probes.solve.refinement import start_refinement
from probes.solve.strength_path import HELD_OUT_GAIN, FoldSearch
from probes.solve.window import Window

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


STRENGTHS = half_decades(4, 8)
ENOUGH = 0.5 / (2 * HELD_OUT_GAIN)
DONE = [1e-6] * 5


@pytest.mark.parametrize(
    ("left", "given", "certified", "settled"),
    [
        (DONE, None, False, True),
        # left-out images may gain more than a neighbour is behind, or lose more than the best one is ahead
        ([1e-6, 1e-6, 1e-6, 1.1 * ENOUGH, 1e-6], None, False, False),
        ([1e-6, 1e-6, 1e-6, 0.9 * ENOUGH, 1e-6], None, False, True),
        ([1e-6, 1e-6, 1.1 * ENOUGH, 1e-6, 1e-6], None, False, False),
        # losses of all strengths that are given are reported as those at the optimum
        (DONE, STRENGTHS, True, True),
        (DONE, STRENGTHS, False, False),
        ([0.01, *DONE[1:]], STRENGTHS, True, False),
    ],
)
def test_the_strength_is_settled_when_its_neighbours_cannot_catch_up(
    left, given, certified, settled
):
    losses = dict.fromkeys(STRENGTHS, 1.0) | {STRENGTHS[2]: 0.5}
    window = Window([*STRENGTHS], given, STRENGTHS[2], losses)
    rows = window.settle(left, certified)
    assert window.settled == settled
    assert rows == ((list(range(5)) if given else [1, 2, 3]) if settled else None)


@pytest.mark.parametrize(
    ("best", "behind", "left", "moved"),
    [
        (4, 0.5, 0.05, 0),  # weak strengths score well before their optimum
        (4, 0.5, 0.005, 2),
        (0, 0.0, 0.05, 0),  # right after they have entered, all are alike
        (0, 0.005, 0.05, 0),
        (0, 0.02, 0.05, -2),  # to stop early does not make strong ones look better
        (0, 0.1, 0.005, -2),
    ],
)
def test_probes_that_have_stopped_early_leave_no_losses_and_move_to_stronger_ones_alone(
    best, behind, left, moved
):
    """The losses may be lower than at the optimum, and the path would be lowest there."""
    losses = dict.fromkeys(STRENGTHS, 1.0 + behind) | {STRENGTHS[best]: 1.0}
    window = Window([*STRENGTHS], None, STRENGTHS[2], losses)
    window.move([left] * 5)
    assert window.strengths == [*half_decades(4 + moved, 8 + moved)]
    gone = set(STRENGTHS) - set(window.strengths)
    assert losses.keys() == {*STRENGTHS} - (gone if left > 0.01 else set())
