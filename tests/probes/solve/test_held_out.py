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
from probes.solve.objective import NODES, SiteProblem
from probes.solve.path import FoldSearch

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
        self.masks = self.prepare(self.target)
        self.scored = scored_masks(
            self.masks,
            self.fold_of,
            target_of=lambda image: self.target[image],
            prepare=self.prepare,
        )
        self.points = torch.randn(
            FOLDS, CLASSES, WIDTH + 1, generator=generator, dtype=torch.float64
        )

    @staticmethod
    def prepare(target: torch.Tensor) -> PreparedMasks:
        return prepare_masks(target, CLASSES, GRID, NODES)

    def site_problem(self) -> SiteProblem:
        return SiteProblem(
            CROSS_ENTROPY,
            self.states,
            self.masks,
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


def test_the_loss_of_left_out_images_is_that_of_classes_which_two_folds_have(data):
    found = data.site_problem().held_out_loss(data.points)
    assert found == pytest.approx(data.loss_at_pixels(data.points), rel=1e-4)


def test_where_the_bias_of_an_unknown_class_ends_makes_no_difference(data):
    """At the optimum of the fold, it is minus infinity; solvers stop at -12 or at -300."""
    points = data.points.clone()
    points[0, LONE, -1] = -30
    low = data.site_problem().held_out_loss(points)
    points[0, LONE, -1] = -300
    lowest = data.site_problem().held_out_loss(points)
    assert low == pytest.approx(lowest, abs=1e-6)


def test_all_folds_are_still_trained_on_the_class(data):
    problem = data.site_problem()
    value, _ = problem.objective(torch.ones(1), [1])(data.points[:1], [0])
    probe = problem.space.to_states(data.points[:1])
    trained, tested = (
        problem.sums(0, probe, masks, needs_grad=False)[0]
        for masks in (problem.masks, problem.scored_masks)
    )
    assert trained > tested
    assert problem.pixels.sum() == (data.target != 255).sum()
    assert value.isfinite().all()


def test_probes_of_all_images_start_from_folds_that_know_the_class(data):
    search = FoldSearch(data.site_problem())
    _, points = search.choose((1e-2,))
    of_folds = search.visited[1e-2].points
    expected = of_folds.mean(0)
    expected[LONE] = of_folds[1:, LONE].mean(0)
    torch.testing.assert_close(points[0], expected)


def test_what_is_known_of_the_curvature_is_of_a_fold_that_knows_the_class(data):
    """The first fold has none along its weights, so that no step would lower the loss of all images."""
    search = FoldSearch(data.site_problem())
    search.visit(1e-2)
    second = [pair.step[1] for pair in search.pairs]
    search.choose((1e-2,))
    found = [pair.step[0] for pair in search.pairs][: len(second)]
    assert second and all(map(torch.equal, found, second))


def test_masks_without_the_class_are_those_of_masks_that_ignore_it(data):
    expected = data.prepare(data.target.masked_fill(data.target == LONE, 255))
    for name in ("mass", "soft", "pixels"):
        torch.testing.assert_close(getattr(data.scored, name), getattr(expected, name))
    counts = class_pixels(data.masks, data.fold_of, FOLDS)
    assert lone_classes(counts).nonzero().tolist() == [[0, LONE]]


def test_masks_of_the_class_that_would_test_its_fold_are_refused(data):
    with pytest.raises(ValueError, match="scored_masks"):
        SiteProblem(CROSS_ENTROPY, data.states, data.masks, data.fold_of)


def test_no_image_is_left_out_of_one_fold(data):
    one_fold = torch.zeros(IMAGES, dtype=torch.long)
    problem = SiteProblem(CROSS_ENTROPY, data.states, data.masks, one_fold)
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
