"""Counts and scores against numpy, written pixel by pixel."""

from unittest import mock

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probes.ops import pixel_counts
from probes.ops.bilinear import upsampled_argmax
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import count
from probes.score.image_metrics import TaskMetric
from probes.score.resampling import dataset_scores
from probes.tasks import TASKS

pytestmark = pytest.mark.numerics

CLASSES = 5
GRID = (2, 3)
GEOMETRY = Geometry(GRID, 12, 12)
TASK = TASKS["segmentation"]


def random_batch(
    seed: int,
    images: int = 3,
    sites: int = 2,
    size=(11, 13),
    absent: int | None = 3,
):
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(
            sites,
            images,
            CLASSES,
            *GRID,
            generator=generator,
        )
        * 3
    )
    target = torch.randint(
        0,
        CLASSES,
        (images, *size),
        generator=generator,
    )
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    if absent is not None:
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


def test_score_is_of_the_dataset_not_the_mean_of_images():
    """All 10 pixels of image 0 are class 0 and right; of image 1, 2 are class 0 and 8 class 1, all called class 1."""
    target = torch.tensor([[[0] * 10], [[0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]], dtype=torch.uint8)
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(
        1,
        2,
        2,
        1,
        1,
    )
    sums = TASK.sums(count(logits, target)._asdict())
    score = dataset_scores(TASK, sums)
    assert TASK.iou(sums.sum(1))[0].tolist() == [pytest.approx(10 / 12), pytest.approx(8 / 10)]
    assert score["miou"].item() == pytest.approx(
        (10 / 12 + 8 / 10) / 2
    )  # the mean of images would be 0.7
    assert score["pacc"].item() == pytest.approx(18 / 20)


@pytest.mark.parametrize("order", [[2, 0, 1, 2], [0, 2], [0, 2, 2]])
def test_an_image_that_is_seen_twice_or_never_is_an_error(order):
    logits, target = random_batch(2)
    metric = TaskMetric(TASK, 3, GEOMETRY)
    metric.add(logits[:, order], {"target": target[order], "index": torch.tensor(order)})
    with pytest.raises(RuntimeError, match="expected each of 3 images once"):
        metric.compute()


@pytest.mark.parametrize(
    ("size", "at_once"), [((12, 12), 2**18), ((11, 13), 1), ((2, 3), 2**18), ((7, 20), 400)]
)
def test_patch_counts_by_chunk_equal_a_loop(size, at_once):
    logits, target = random_batch(3, size=size)
    predicted = upsampled_argmax(logits, size)
    with mock.patch.dict(pixel_counts.PIXELS_AT_ONCE, cpu=at_once):
        counts = count(logits, target)
    for n in range(3):
        for t in range(6):
            rows = [y for y in range(size[0]) if int((y + 0.5) * GRID[0] / size[0]) == t // GRID[1]]
            columns = [
                x for x in range(size[1]) if int((x + 0.5) * GRID[1] / size[1]) == t % GRID[1]
            ]
            cell = np.ix_(rows, columns)
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
