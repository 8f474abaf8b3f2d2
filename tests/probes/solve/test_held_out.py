"""Pixels of a class that only their fold has take no part in the choice of the strength."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import CROSS_ENTROPY

import probes
from llava_bidir.common.errors import UserError
from probes.ops.quadrature import PreparedMasks, prepare_masks
from probes.solve.held_out import scored_masks
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
        self.problem = SiteProblem(
            CROSS_ENTROPY,
            self.states,
            self.masks,
            self.fold_of,
            self.scored,
        )
        shape = (FOLDS, CLASSES, WIDTH + 1)
        self.points = torch.randn(shape, generator=generator, dtype=torch.float64)

    @staticmethod
    def prepare(target: torch.Tensor) -> PreparedMasks:
        return prepare_masks(target, CLASSES, GRID, NODES)

    def loss_at_pixels(self, points: torch.Tensor) -> float:
        """Return the mean loss, by F.interpolate and F.cross_entropy, of all pixels but those of the class."""
        space = self.problem.space
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
    found = data.problem.held_out_loss(data.points)
    assert found == pytest.approx(data.loss_at_pixels(data.points), rel=1e-4)


def test_all_folds_are_still_trained_on_the_class(data):
    problem = data.problem
    probe = problem.space.to_states(data.points[:1])
    trained, tested = (
        problem.sums(0, probe, masks, needs_grad=False)[0]
        for masks in (problem.masks, problem.scored_masks)
    )
    assert trained > tested
    assert problem.pixels.sum() == (data.target != 255).sum()


def test_probes_of_all_images_start_from_folds_that_know_the_class(data):
    search = FoldSearch(data.problem)
    _, points = search.choose((1e-2,))
    of_folds = search.visited[1e-2].points
    expected = of_folds.mean(0)
    expected[LONE] = of_folds[1:, LONE].mean(0)
    torch.testing.assert_close(points[0], expected)


def test_classes_of_one_fold_each_are_an_error(data):
    masks = [np.full(SIZE, image % 2, np.uint8) for image in range(IMAGES)]
    with pytest.raises(UserError, match="each class is labelled in only one of 2 folds"):
        probes.solve_features(data.states.unflatten(1, GRID), masks, 2, folds=2)
