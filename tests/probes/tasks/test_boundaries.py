"""Scores and loss of boundaries against loops over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import IGNORED

from probes.tasks.boundaries import THRESHOLDS, TOLERANCE, Boundaries, dilate, histogram


def draw(seed: int = 0, size: tuple[int, int] = (30, 41)) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities f[P, H, W] that know something about the target, and the target uint8[H, W]."""
    rng = np.random.default_rng(seed)
    target = np.zeros(size, np.uint8)
    target[rng.integers(5, 25), 3:35] = 1
    target[4:28, rng.integers(8, 35)] = 1
    target[-2:, :9] = IGNORED
    noise = rng.uniform(size=(2, *size))
    return torch.from_numpy(
        np.clip(0.4 * (target == 1) + 0.6 * noise, 0, 1)
    ).float(), torch.from_numpy(target)


def counts_of(
    probability: np.ndarray,
    target: np.ndarray,
    threshold: float,
    radius: float,
) -> tuple[int, int, int]:
    """Return pixels predicted, right ones, and boundary pixels found, by looping over pixels."""
    predicted = [tuple(p) for p in np.argwhere((probability >= threshold) & (target != IGNORED))]
    truth = [tuple(p) for p in np.argwhere(target == 1)]

    def close(p, points):
        return any(math.dist(p, q) <= radius for q in points)

    return (
        len(predicted),
        sum(close(p, truth) for p in predicted),
        sum(close(q, predicted) for q in truth),
    )


@pytest.mark.parametrize("radius", [0.0, 1.0, 1.5, 3.3])
def test_dilation_is_by_a_disc(radius):
    maps = torch.rand(
        1,
        9,
        11,
        generator=torch.Generator().manual_seed(0),
    )
    grown = dilate(maps, radius)
    for y, x in np.ndindex(9, 11):
        disc = [maps[0, i, j] for i, j in np.ndindex(9, 11) if math.dist((i, j), (y, x)) <= radius]
        assert grown[0, y, x] == max(disc)


def test_scores_equal_loops_over_pixels_of_two_images(monkeypatch):
    """F at the best threshold and average precision of the sums over the images, at a tolerance of a few pixels."""
    monkeypatch.setattr("probes.tasks.boundaries.TOLERANCE", 0.03)
    task = Boundaries()
    images = [draw(seed) for seed in (0, 1)]
    sums = sum(task.image_sums(*image) for image in images)
    ours = task.dataset_scores(sums)
    boundaries = sum(int((target == 1).sum()) for _, target in images)
    radius = 0.03 * math.hypot(30, 41)
    for probe in range(2):
        best = 0.0
        area = 0.0
        before = 0.0
        for step in range(THRESHOLDS, 0, -4):  # the loops are slow: every fourth threshold
            threshold = np.float32(step / (THRESHOLDS + 1))
            parts = [
                counts_of(
                    p[probe].numpy(),
                    t.numpy(),
                    threshold,
                    radius,
                )
                for p, t in images
            ]
            predicted, right, found = np.sum(parts, 0)
            tail = slice(step - 1, None)
            split = sums[probe].split([THRESHOLDS] * 3 + [1])
            assert [int(x[tail].sum()) for x in split[:3]] == [predicted, right, found]
            precision = right / max(predicted, 1)
            recall = found / boundaries
            best = max(best, 2 * precision * recall / max(precision + recall, 1e-12))
            area = area + precision * (recall - before)
            before = recall
        assert best <= ours["f"][probe] <= best + 0.05
        assert ours["ap"][probe] == pytest.approx(area, abs=0.03)


def test_a_perfect_prediction_has_score_1_and_a_shift_within_the_tolerance_changes_nothing():
    task, (_, target) = Boundaries(), draw(size=(120, 160))
    assert int(TOLERANCE * math.hypot(120, 160)) == 1
    perfect = (target == 1).float()[None] * 0.9
    for prediction in (perfect, perfect.roll(1, 2)):
        scores = task.dataset_scores(task.image_sums(prediction, target))
        assert scores["f"].item() == pytest.approx(1)
        assert scores["ap"].item() == pytest.approx(1)
    far = task.dataset_scores(task.image_sums(perfect.roll((0, 9), (1, 2)), target))
    assert far["f"] < 0.9


def test_loss_weighs_both_classes_alike():
    (_, target), task = draw(), Boundaries()
    maps = torch.randn(
        3,
        1,
        2,
        30,
        41,
        generator=torch.Generator().manual_seed(0),
    )
    counts = torch.tensor([(target == k).sum() for k in (0, 1)])
    expected = [
        F.cross_entropy(
            z,
            target[None].long(),
            1 / counts,
            ignore_index=IGNORED,
        )
        for z in maps
    ]
    torch.testing.assert_close(task.image_losses(maps, target[None])[:, 0], torch.stack(expected))
    empty = task.image_losses(maps, torch.full_like(target, IGNORED)[None])
    assert (empty == 0).all()


def test_ignored_pixels_change_nothing():
    (probability, target), task = draw(), Boundaries()
    other = torch.where(target == IGNORED, 1 - probability, probability)
    torch.testing.assert_close(task.image_sums(other, target), task.image_sums(probability, target))


def test_counts_do_not_end_where_float32_does():
    assert histogram(torch.full((1, 2**24 + 2), 0.5)).sum() == 2**24 + 2
