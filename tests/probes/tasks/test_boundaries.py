"""Scores and loss of boundaries against loops over pixels."""

import math
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from reference import IGNORED

from probes.tasks.boundaries import THRESHOLDS, Boundaries, histogram


def draw() -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities f[P, H, W] that know something about the target, and the target uint8[H, W]."""
    rng = np.random.default_rng(0)
    target = np.zeros((30, 41), np.uint8)
    target[rng.integers(5, 25), 3:35] = 1
    target[4:28, rng.integers(8, 35)] = 1
    target[-2:, :9] = IGNORED
    noise = rng.uniform(size=(2, 30, 41))
    return torch.from_numpy(
        np.clip(0.4 * (target == 1) + 0.6 * noise, 0, 1)
    ).float(), torch.from_numpy(target)


def counts_of(
    probability: np.ndarray, target: np.ndarray, threshold: float, radius: float
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


def test_sums_equal_loops_over_pixels(monkeypatch):
    """At a tolerance of a few pixels. F and average precision follow; tests/probes/fit/test_tasks.py has them."""
    monkeypatch.setattr("probes.tasks.boundaries.TOLERANCE", 0.065)
    probability, target = draw()
    sums = Boundaries().image_sums(probability, target)
    assert (sums[:, -1] == (target == 1).sum()).all()
    for probe, step in product(range(2), range(0, THRESHOLDS, 4)):  # the loops are slow
        counts = counts_of(
            probability[probe].numpy(),
            target=target.numpy(),
            threshold=np.float32((step + 1) / (THRESHOLDS + 1)),
            radius=0.065 * math.hypot(30, 41),
        )
        above = sums[probe, :-1].view(3, -1)[:, step:].sum(1)
        assert above.tolist() == list(counts)


def test_loss_weighs_both_classes_alike():
    (_, target), task = draw(), Boundaries()
    maps = torch.randn((3, 1, 2, 30, 41), generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([(target == k).sum() for k in (0, 1)])
    expected = [
        F.cross_entropy(z, target[None].long(), 1 / counts, ignore_index=IGNORED) for z in maps
    ]
    torch.testing.assert_close(task.image_losses(maps, target[None])[:, 0], torch.stack(expected))
    empty = task.image_losses(maps, torch.full_like(target, IGNORED)[None])
    assert (empty == 0).all()


def test_counts_do_not_end_where_float32_does():
    assert histogram(torch.full((1, 2**24 + 2), 0.5)).sum() == 2**24 + 2
