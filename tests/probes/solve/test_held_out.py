"""Pixels of a class that only their fold has take no part in the choice of the strength."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY

import probes
from llava_bidir.common.errors import UserError
from probes.ops.quadrature import PreparedMasks, prepare_masks
from probes.solve.held_out import class_pixels, lone_classes, scored_masks
from probes.solve.objective import LOOSE_NODES, TIGHT_NODES, PixelProblem, SiteProblem
from probes.solve.pass_sums import PassSums
from probes.solve.refinement import start_refinement
from probes.solve.strength_path import FoldSearch

pytestmark = pytest.mark.numerics

GRID = (3, 3)
SIZE = (24, 24)
CLASSES = 4
LONE = 3  # only the first fold has it
FOLDS = 3
IMAGES = 12
WIDTH = 5


class Data:
    """States f32[B, T, d] and masks uint8[B, H, W]; two images of the first fold have a class of their own."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, LONE, (IMAGES, *GRID), generator=generator)
        tokens[0, 0] = LONE
        tokens[1, :, 1] = LONE
        self.fold_of = torch.arange(IMAGES) // 2 % FOLDS
        self.target = F.interpolate(tokens[:, None].float(), SIZE)[:, 0].to(torch.uint8)
        self.target[:, :2] = 255
        means = torch.randn(CLASSES, WIDTH, generator=generator)
        noise = torch.randn(IMAGES, 9, WIDTH, generator=generator)
        self.states = means[tokens.flatten(1)] + 2 * noise
        self.loose = prepare_masks(self.target, CLASSES, GRID, LOOSE_NODES)
        self.tight = self.prepare(self.target)
        self.scored = scored_masks(
            self.tight,
            self.fold_of,
            target_of=lambda image: self.target[image],
            prepare=self.prepare,
        )
        self.points = torch.randn(
            FOLDS, CLASSES, WIDTH + 1, generator=generator, dtype=torch.float64
        )

    @staticmethod
    def prepare(target: torch.Tensor) -> PreparedMasks:
        return prepare_masks(target, CLASSES, GRID, TIGHT_NODES)

    def site_problem(self) -> SiteProblem:
        return SiteProblem(
            CROSS_ENTROPY,
            self.states,
            self.loose,
            self.tight,
            self.fold_of,
            self.scored,
        )

    def loss_at_pixels(self, points: torch.Tensor) -> float:
        """Return the mean loss, by F.interpolate and F.cross_entropy, of all pixels but those of the class."""
        space = self.site_problem().space
        target = self.target.masked_fill(self.target == LONE, 255).long()
        total = 0.0
        for image, fold in enumerate(self.fold_of.tolist()):
            by_token = space.coordinates(self.states[image]).double() @ points[fold].T
            logits = F.interpolate(by_token.T.view(1, CLASSES, *GRID), SIZE, mode="bilinear")
            total += F.cross_entropy(
                logits, target[image, None], ignore_index=255, reduction="sum"
            ).item()
        return total / (target != 255).sum().item()


@pytest.fixture(scope="module")
def data() -> Data:
    return Data()


def by_passes(data: Data, points: torch.Tensor) -> float:
    """Return the loss of left-out images, as an exact pass sums it in batches of mixed folds."""
    space = data.site_problem().space
    weights = torch.cat([space.to_states(points[..., :-1]), points[..., -1:]], -1)
    of_all = torch.cat([weights, weights[:1]])[None]
    sums = PassSums(CROSS_ENTROPY, space.mean, of_all, [*range(FOLDS), None], FOLDS)
    for images in (range(5), range(5, IMAGES)):
        images = list(images)
        folds = data.fold_of[images].tolist()
        sums.add(
            data.states[images],
            data.tight[images],
            data.scored[images],
            folds,
        )
    pixels = torch.stack([data.tight.pixels[data.fold_of == fold].sum() for fold in range(FOLDS)])
    _, _, held_out = sums.means(space, pixels)
    return held_out.sum().item()


def in_memory(data: Data, points: torch.Tensor) -> float:
    return data.site_problem().held_out_loss(points)


@pytest.mark.parametrize("loss", [in_memory, by_passes])
def test_the_loss_of_left_out_images_is_that_of_classes_which_two_folds_have(data, loss):
    assert loss(data, data.points) == pytest.approx(data.loss_at_pixels(data.points), rel=1e-4)


@pytest.mark.parametrize("loss", [in_memory, by_passes])
def test_where_the_bias_of_an_unknown_class_ends_makes_no_difference(data, loss):
    """At the optimum of the fold, it is minus infinity; solvers stop at -12 or at -300."""
    points = data.points.clone()
    points[0, LONE, -1] = -30
    low = loss(data, points)
    points[0, LONE, -1] = -300
    lowest = loss(data, points)
    assert low == pytest.approx(lowest, abs=1e-6)


def test_pixels_in_memory_are_tested_by_the_same_rule(data):
    """At the states of tokens, with labels of their own."""
    space = data.site_problem().space
    labels = data.target[:, 4::8, 4::8].flatten().long()
    fold_of = data.fold_of.repeat_interleave(9)
    inputs = space.coordinates(data.states).flatten(0, 1)
    weights = torch.linspace(1, 2, len(labels), dtype=torch.float64)
    problem = PixelProblem(
        space,
        CROSS_ENTROPY,
        inputs,
        labels,
        weights,
        fold_of,
        FOLDS,
    )
    known = labels != LONE
    assert not known.all()
    logits = (data.points[fold_of] @ inputs.double()[..., None])[..., 0]
    losses = F.cross_entropy(logits, labels, reduction="none")
    expected = (losses * weights)[known].sum() / weights[known].sum()
    assert problem.held_out_loss(data.points) == pytest.approx(expected.item(), rel=1e-5)


def test_all_folds_are_still_trained_on_the_class(data):
    problem = data.site_problem()
    value, _ = problem.objective(torch.ones(1), [1], TIGHT_NODES)(data.points[:1], [0])
    tested, _ = problem.sums(0, data.points[:1], TIGHT_NODES, needs_grad=False)
    assert tested > problem.scored_sum(0, data.points[0])
    assert problem.pixels.sum() == (data.target != 255).sum()
    assert value.isfinite().all()


def test_probes_of_all_images_start_from_folds_that_know_the_class(data):
    search = FoldSearch(data.site_problem())
    found = search.solve((1e-2,))
    expected = found.fold_points.mean(0)
    expected[LONE] = found.fold_points[1:, LONE].mean(0)
    torch.testing.assert_close(found.points[0], expected)


def test_what_is_known_of_the_curvature_is_of_a_fold_that_knows_the_class(data):
    """The first fold has none along its weights, so that no step would lower the loss of all images."""
    _, refinement = start_refinement(data.site_problem(), (1e-1, 1e-2, 1e-3))
    exact = refinement._objective(TIGHT_NODES)
    before, gradient = exact(refinement.points, [0, 1, 2])
    refinement.accept(before, gradient)
    refinement._step_with_few_nodes()
    after, _ = exact(refinement.points, [0, 1, 2])
    assert (after < before).all()


def test_masks_without_the_class_are_those_of_masks_that_ignore_it(data):
    expected = data.prepare(data.target.masked_fill(data.target == LONE, 255))
    for name in ("mass", "soft", "pixels"):
        torch.testing.assert_close(getattr(data.scored, name), getattr(expected, name))
    counts = class_pixels(data.tight, data.fold_of, FOLDS)
    assert lone_classes(counts).nonzero().tolist() == [[0, LONE]]


def test_masks_of_the_class_that_would_test_its_fold_are_refused(data):
    with pytest.raises(ValueError, match="scored_masks"):
        SiteProblem(
            CROSS_ENTROPY,
            data.states,
            data.loose,
            data.tight,
            data.fold_of,
        )


def test_no_image_is_left_out_of_one_fold(data):
    one_fold = torch.zeros(IMAGES, dtype=torch.long)
    problem = SiteProblem(
        CROSS_ENTROPY,
        data.states,
        data.loose,
        data.tight,
        one_fold,
    )
    assert not problem.lone.any()


def test_features_of_ones_own_are_tested_by_the_rule(data):
    """With the class in one image; `SiteProblem` refuses masks that would test by it."""
    target = data.target.clone()
    target[1:][target[1:] == LONE] = 255
    probe = probes.solve_features(data.states.unflatten(1, GRID), list(target), CLASSES, folds=3)
    assert probe.converged


def test_classes_of_one_fold_each_are_an_error(data):
    masks = [np.full(SIZE, image % 2, np.uint8) for image in range(IMAGES)]
    with pytest.raises(UserError, match="each class is labelled in only one of 2 folds"):
        probes.solve_features(data.states.unflatten(1, GRID), masks, 2, folds=2)
