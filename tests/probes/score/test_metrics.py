"""Counts and scores against numpy, written pixel by pixel."""

from unittest import mock

import numpy as np
import pytest
import reference
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_ranks
from torchmetrics.classification import MulticlassJaccardIndex

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.ops import pixel_counts
from probes.ops.bilinear import upsampled_argmax
from probes.ops.geometry import Geometry
from probes.ops.pixel_counts import count
from probes.score import TaskMetric
from probes.score.estimate import dataset_scores, resampled_scores
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
        metric.update(logits[:, i : i + 1], target[i : i + 1], torch.tensor([i]))
    sums = TASK.sums(metric.compute())
    ours = dataset_scores(TASK, sums)
    iou_per_class = TASK.iou(sums.sum(1))
    predicted = upsampled_argmax(logits, target.shape[-2:]).numpy()
    for site in range(2):
        miou, pacc, iou = reference.scores(list(predicted[site]), list(target.numpy()), CLASSES)
        assert ours["miou"][site].item() == pytest.approx(miou, abs=1e-12)
        assert ours["pacc"][site].item() == pytest.approx(pacc, abs=1e-12)
        assert [None if x != x else pytest.approx(x) for x in iou_per_class[site].tolist()] == iou


def of_torchmetrics(average: str) -> MulticlassJaccardIndex:
    return MulticlassJaccardIndex(CLASSES, average=average, ignore_index=255)


def compare_with_torchmetrics(images: list[int], size: int) -> None:
    """Count some of five images here, the others in the other processes; compare what is of all.

    Images have two sizes and ignored pixels. Class 3 is nowhere, and the second site does not predict it either.
    """
    batches = [random_batch(0, images=3), random_batch(1, images=2, size=(7, 5))]
    for logits, _ in batches:
        logits[1, :, 3] = -100
    of_images = [(logits[:, i], masks[i]) for logits, masks in batches for i in range(len(masks))]
    metric = TaskMetric(TASK, 5, GEOMETRY)
    theirs = [(of_torchmetrics("macro"), of_torchmetrics("none")) for _ in range(2)]
    for _ in range(2):  # after a reset again
        for first in range(0, len(images), size):
            part = images[first : first + size]
            logits = torch.stack([of_images[i][0] for i in part], 1)
            metric.update(logits, [of_images[i][1] for i in part], torch.tensor(part))
        sums = TASK.sums(metric.compute())
        metric.reset()
        ours = dataset_scores(TASK, sums)["miou"]
        for site, metrics in enumerate(theirs):
            for of_field in metrics:
                for i in images:
                    logits, mask = of_images[i]
                    predicted = upsampled_argmax(logits[site, None], mask.shape)[0]
                    of_field.update(predicted.long(), mask.long())
            miou, by_class = (of_field.compute().double() for of_field in metrics)
            torch.testing.assert_close(ours[site], miou, rtol=1e-6, atol=0)
            ious = TASK.iou(sums.sum(1))[site]
            torch.testing.assert_close(ious.nan_to_num(), by_class, rtol=1e-6, atol=0)
            assert ious.isnan().tolist() == [site == 1 and k == 3 for k in range(CLASSES)]
            for of_field in metrics:
                of_field.reset()


def test_scores_are_those_of_torchmetrics():
    assert issubclass(TaskMetric, torchmetrics.Metric)
    compare_with_torchmetrics([3, 1, 4, 0, 2], size=2)


def in_two_processes() -> None:
    torch.distributed.init_process_group("gloo")
    compare_with_torchmetrics([[0, 3, 2], [4, 1]][torch.distributed.get_rank()], size=2)


@pytest.mark.distributed
def test_scores_of_two_processes_are_those_of_torchmetrics(tmp_path):
    codes, ends = run_ranks(in_two_processes, tmp_path)
    assert codes == [0, 0], ends


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


def test_counts_are_those_of_each_image_whatever_batch_it_was_in():
    """Sums over images do not see an order; paired differences and intervals do."""
    batches = [random_batch(0, images=3), random_batch(1, images=2, size=(7, 5))]
    of_images = [(logits[:, i], masks[i]) for logits, masks in batches for i in range(len(masks))]
    metric = TaskMetric(TASK, 5, GEOMETRY)
    for part in ([3, 0, 4], [2, 1]):
        logits = torch.stack([of_images[i][0] for i in part], 1)
        metric.update(logits, [of_images[i][1] for i in part], torch.tensor(part))
    counts = metric.compute()
    for i, (logits, mask) in enumerate(of_images):
        alone = TaskMetric(TASK, 1, GEOMETRY)
        alone.update(logits[:, None], mask[None], torch.tensor([0]))
        for name, expected in alone.compute().items():
            image = counts[name].select(-2, i)
            assert torch.equal(image, expected.select(-2, 0)), (name, i)


@pytest.mark.parametrize("order", [[2, 0, 1, 2], [0, 2]])
def test_an_image_that_is_seen_twice_or_never_is_an_error(order):
    logits, target = random_batch(2)
    metric = TaskMetric(TASK, 3, GEOMETRY)
    metric.update(logits[:, order], target[order], torch.tensor(order))
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
