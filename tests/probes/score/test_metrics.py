"""Counts and scores against numpy, written pixel by pixel."""

from unittest import mock

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.ops import pixel_counts
from probes.ops.bilinear import upsampled_argmax
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import count
from probes.score.estimate import dataset_scores, resampled_scores
from probes.score.image_metrics import TaskMetric
from probes.tasks import TASKS

pytestmark = pytest.mark.numerics

CLASSES = 5
GRID = (2, 3)
GEOMETRY = Geometry(GRID, 12, 12)
TASK = TASKS["segmentation"]


def random_batch(
    seed: int, images: int = 3, size=(11, 13), absent: int | None = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of two sites, f[2, B, K, h, w], and masks uint8[B, H, W] without a class."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, images, CLASSES, *GRID, generator=generator)
    target = torch.randint(CLASSES, (images, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[target == absent] = 255
    return logits, target.to(torch.uint8)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([None, 0, 3]))
def test_scores_equal_numpy_with_absent_classes_and_ignored_pixels(seed, absent):
    logits, target = random_batch(seed, absent=absent)
    metric = TaskMetric(TASK, 3, GEOMETRY)
    for i in range(3):
        metric.add(logits[:, i : i + 1], {"target": target[i : i + 1], "index": torch.tensor([i])})
    sums = TASK.sums(metric.compute())
    ours = dataset_scores(TASK, sums)
    iou_per_class = TASK.iou(sums.sum(1))
    predicted = upsampled_argmax(logits, target.shape[-2:]).numpy()
    for site in range(2):
        miou, pacc, iou = reference.scores(list(predicted[site]), list(target.numpy()), CLASSES)
        assert ours["miou"][site].item() == pytest.approx(miou, abs=1e-12)
        assert ours["pacc"][site].item() == pytest.approx(pacc, abs=1e-12)
        assert [None if x != x else pytest.approx(x) for x in iou_per_class[site].tolist()] == iou


def test_resampled_scores_equal_a_loop_over_drawn_images():
    logits, target = random_batch(0, images=30)
    sums = TASK.sums(count(logits, target)._asdict())
    weights = bootstrap_weights(30, 20)
    ours = resampled_scores(TASK, sums, weights)
    for r in range(20):
        drawn = torch.repeat_interleave(torch.arange(30), weights[r].long())
        again = TASK.sums(count(logits[:, drawn], target[drawn])._asdict())
        for name, score in dataset_scores(TASK, again).items():
            torch.testing.assert_close(ours[name][r], score)


@pytest.mark.parametrize("order", [[2, 0, 1, 2], [0, 2]])
def test_an_image_that_is_seen_twice_or_never_is_an_error(order):
    logits, target = random_batch(2)
    metric = TaskMetric(TASK, 3, GEOMETRY)
    metric.add(logits[:, order], {"target": target[order], "index": torch.tensor(order)})
    with pytest.raises(RuntimeError, match="expected each of 3 images once"):
        metric.compute()


@pytest.mark.parametrize(("size", "at_once"), [((11, 13), 1), ((2, 3), 2**18), ((7, 20), 400)])
def test_patch_counts_by_chunk_equal_a_loop(size, at_once):
    logits, target = random_batch(3, size=size)
    predicted = upsampled_argmax(logits, size)
    with mock.patch.dict(pixel_counts.PIXELS_AT_ONCE, cpu=at_once):
        counts = count(logits, target)
    for n in range(3):
        for t in range(6):
            cell = np.ix_(
                *(
                    [y for y in range(m) if int((y + 0.5) * n / m) == at]
                    for n, m, at in zip(GRID, size, divmod(t, GRID[1]), strict=True)
                )
            )
            truth = target[n].numpy()[cell]
            assert counts.patch_valid[n, t] == (truth != 255).sum()
            for s in range(2):
                right = (predicted[s, n].numpy()[cell] == truth) & (truth != 255)
                assert counts.patch_right[s, n, t] == right.sum()
    assert torch.equal(counts.patch_right.sum(-1), counts.intersection.sum(-1))


def test_patch_labels_are_majorities():
    target = torch.full((1, 4, 6), 255, dtype=torch.uint8)
    target[0, :2, :2] = torch.tensor([[1, 1], [1, 2]])  # three quarters of class 1
    target[0, 2:, 2:4] = torch.tensor([[4, 255], [4, 4]])
    target[0, 2:, 4:] = torch.tensor([[0, 3], [3, 0]])
    logits = torch.zeros(1, 1, CLASSES, *GRID)
    assert count(logits, target).patch_class.tolist() == [[1, -1, -1, -1, 4, 0]]
