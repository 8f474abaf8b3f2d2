"""Bootstrap and permutations against loops, intervals that cover, tests that reject as often as they say."""

import numpy as np
import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights, interval, p_values, random_swaps
from probes.evaluation.bootstrap import dataset_scores, resampled_scores, swapped_scores
from probes.evaluation.metrics import Counts


def random_counts(seed: int, images: int = 30, classes: int = 4, sites: int = 2) -> Counts:
    rng = np.random.default_rng(seed)
    labelled = rng.multinomial(100, [0.6, 0.25, 0.1, 0.05], images)
    intersection = rng.binomial(labelled, [0.8, 0.6, 0.4, 0.3], (sites, images, classes))
    wrong = labelled.sum(-1) - intersection.sum(-1)
    predicted = intersection + np.stack([[rng.multinomial(n, [0.25] * 4) for n in site] for site in wrong])
    tensors = [torch.from_numpy(x) for x in (intersection, predicted, labelled)]
    return Counts(*tensors, torch.zeros(sites, images, 1), torch.zeros(images, 1))


def test_resampled_scores_equal_a_loop_over_drawn_images():
    counts = random_counts(0)
    weights = bootstrap_weights(30, 20)
    ours = resampled_scores(counts, weights)
    for r in range(20):
        drawn = torch.repeat_interleave(torch.arange(30), weights[r].long())
        again = Counts(*(x[:, drawn] for x in counts[:2]), counts.labelled[drawn], *counts[3:])
        torch.testing.assert_close(ours.miou[r], dataset_scores(again).miou)
        torch.testing.assert_close(ours.pacc[r], dataset_scores(again).pacc)


def test_weights_draw_as_many_images_as_there_are():
    weights = bootstrap_weights(17, 50, seed=3)
    assert (weights.sum(1) == 17).all() and torch.equal(weights, bootstrap_weights(17, 50, seed=3))
    assert not torch.equal(weights, bootstrap_weights(17, 50, seed=4))


def test_interval_reflects_the_resampled_values():
    low, high = interval(10.0, torch.linspace(8, 11, 1001))
    assert low == pytest.approx(20 - 10.925) and high == pytest.approx(20 - 8.075)


def test_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        values = torch.from_numpy(rng.exponential(1.0, 60))
        low, high = interval(values.mean().item(), bootstrap_weights(60, 400).double() @ values / 60)
        covered += low <= 1.0 <= high
    assert 0.87 <= covered / 200 <= 0.98


def test_interval_of_miou_is_not_pulled_down_by_classes_that_drop_out():
    """Percentile intervals are; the reason why ours are reflected."""
    counts = random_counts(2, images=25)
    resampled = resampled_scores(counts, bootstrap_weights(25)).miou[:, 0]
    estimate = dataset_scores(counts).miou[0].item()
    low, high = interval(estimate, resampled)
    assert low < estimate < high


GROUPS = torch.tensor([7, 3, 3, 9, 7, 3])


def test_groups_are_drawn_whole():
    weights = bootstrap_weights(6, 200, seed=1, groups=GROUPS)
    for group in (3, 7, 9):
        members = weights[:, group == GROUPS]
        assert (members == members[:, :1]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()  # three groups a resampling
    assert weights.sum(1).unique().numel() > 1  # of different size


def test_group_weights_are_those_of_the_groups_as_units():
    by_unit = bootstrap_weights(3, 50, seed=2)
    torch.testing.assert_close(bootstrap_weights(6, 50, seed=2, groups=GROUPS), by_unit[:, [1, 0, 0, 2, 1, 0]])


def test_images_of_a_single_group_are_drawn_one_by_one():
    one = torch.zeros(9, dtype=torch.long)
    assert torch.equal(bootstrap_weights(9, 30, groups=one), bootstrap_weights(9, 30))
    assert torch.equal(random_swaps(9, 30, groups=one), random_swaps(9, 30))


def test_interval_by_group_is_wider_where_images_of_a_group_are_alike():
    rng, groups = np.random.default_rng(0), torch.arange(10).repeat_interleave(20)
    values = torch.from_numpy(rng.normal(size=10)).repeat_interleave(20) + torch.from_numpy(rng.normal(0, 0.1, 200))
    width = {}
    for name, by in (("image", None), ("group", groups)):
        weights = bootstrap_weights(200, groups=by).double()
        low, high = interval(values.mean().item(), weights @ values / weights.sum(1))
        width[name] = high - low
    assert width["group"] > 3 * width["image"]


def test_swapped_scores_equal_a_loop_over_swapped_images():
    a, b, swaps = random_counts(0), random_counts(1), random_swaps(30, 20, seed=5)
    b = b._replace(labelled=a.labelled)
    ours = swapped_scores(a, b, swaps)
    for r in range(21):
        mixed = []
        for first, second in ((a, b), (b, a)):
            pick = lambda x, y, r=r: torch.stack([(y if swaps[r, n] else x)[:, n] for n in range(30)], 1)
            fields = (pick(first.intersection, second.intersection), pick(first.predicted, second.predicted))
            mixed.append(dataset_scores(Counts(*fields, a.labelled, *a[3:])))
        for scored, expected in zip(ours, mixed, strict=True):
            torch.testing.assert_close(scored.miou[r], expected.miou)
            torch.testing.assert_close(scored.pacc[r], expected.pacc)


def test_swaps_take_groups_whole_and_leave_the_first_row():
    swaps = random_swaps(6, 100, groups=GROUPS)
    assert swaps.shape == (101, 6) and not swaps[0].any()
    assert (swaps[:, GROUPS == 3] == swaps[:, [1]]).all() and 0.35 < swaps[1:].mean() < 0.65
    assert not (swaps[:, 0] == swaps[:, 1]).all()


def test_p_values_equal_a_loop():
    differences = torch.from_numpy(np.random.default_rng(3).normal(size=(200, 3)) * [1.0, 5.0, 0.1])
    differences[0] = torch.tensor([2.5, 1.0, 0.25])
    raw, corrected = p_values(differences)
    table = differences.abs().numpy()
    spread = [np.sqrt(np.mean(table[:, s] ** 2)) for s in range(3)]
    for s in range(3):
        again = sum(table[r, s] >= table[0, s] for r in range(200)) / 200
        largest = [max(table[r, k] / spread[k] for k in range(3)) for r in range(200)]
        assert raw[s] == pytest.approx(again)
        assert corrected[s] == pytest.approx(sum(m >= table[0, s] / spread[s] for m in largest) / 200)
    assert (corrected >= raw).all() and (raw >= 1 / 200).all()


def test_a_site_without_any_difference_has_p_one():
    differences = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.0])
    raw, corrected = p_values(differences)
    assert raw[1] == 1 and corrected[1] == 1


def pair_of_counts(rng, images: int = 40, sites: int = 5, gain: float = 0.0) -> tuple[Counts, Counts]:
    """Two conditions that are exchangeable by image, but for a gain of the second; sites go together."""
    labelled = rng.multinomial(200, [0.5, 0.3, 0.2], images)
    ease = rng.normal(0, 0.1, (images, 3))
    found = []
    for shift in (0.0, gain):
        own = rng.normal(0, 0.1, (images, 3)) + rng.normal(0, 0.03, (sites, images, 3))
        intersection = rng.binomial(labelled, np.clip(0.6 + shift + ease + own, 0.02, 0.98))
        predicted = intersection + (labelled - intersection)[..., [1, 2, 0]]
        tensors = [torch.from_numpy(x) for x in (intersection, predicted, labelled)]
        found.append(Counts(*tensors, torch.zeros(sites, images, 1), torch.zeros(images, 1)))
    return found[0], found[1]


def test_a_true_gain_is_found_at_every_site():
    a, b = pair_of_counts(np.random.default_rng(0), gain=0.1)
    swapped = swapped_scores(a, b, random_swaps(40, 500))
    raw, corrected = p_values(swapped[1].miou - swapped[0].miou)
    assert (raw < 0.01).all() and (corrected < 0.02).all()


def test_without_a_difference_the_tests_reject_as_often_as_they_say():
    """600 studies of nothing at alpha 0.1: one site, and any of five sites after correction, each 6% to 14%."""
    rng, studies, one, any_raw, any_corrected = np.random.default_rng(1), 600, 0, 0, 0
    for i in range(studies):
        a, b = pair_of_counts(rng)
        swapped = swapped_scores(a, b, random_swaps(40, 199, seed=i))
        raw, corrected = p_values(swapped[1].miou - swapped[0].miou)
        one += bool(raw[0] <= 0.1)
        any_raw += bool((raw <= 0.1).any())
        any_corrected += bool((corrected <= 0.1).any())
    assert 0.06 < one / studies < 0.14 and 0.06 < any_corrected / studies < 0.14
    assert any_raw > any_corrected  # what the correction is for
