"""Contrasts per mistaken patch: against loops over cases, and on simulated knockouts whose truth is known."""

import json

import numpy as np
import probe_runs
import pytest
import torch
from knockouts import CLASSES, N, simulate, write_knockout

from experiments.statistics.contrasts import simulate as simulate_cases
from experiments.statistics.contrasts import study
from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.knockout.knockout_effects import (
    KNOCKOUT_EFFECTS,
    contrast_estimates,
    knockout_effects,
    later_half,
    patch_contrasts,
    select_cases,
)
from probes.runs.read import ProbeRun

pytestmark = pytest.mark.numerics

STUDIES = 300


@pytest.fixture
def run(tmp_path) -> ProbeRun:
    root = tmp_path / "data"
    root.mkdir()
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return ProbeRun(
        probe_runs.write_run(tmp_path / "run", [0.6, 0.5, 0.6, 0.5], root=root, images=N)
    )


def mantel_haenszel(tensors, names, weights):
    """Return the three contrasts under image weights f[N], by a loop over patches' cases."""

    def kind(name):
        """Return the weight of a kind of mistakes, and its mean effects."""

        def left(key):
            return tensors[f"{name}/still_wrong:{key}"][:, 3:].double().mean(1).numpy()

        incorrect, correct = (left(key) - left(f"random_{key}") for key in ("incorrect", "correct"))
        effects = np.stack([incorrect, correct, correct - incorrect], 1)
        w = weights[tensors[f"{name}/image"].numpy()] * tensors[f"{name}/patches"].numpy()
        return w.sum(), w @ effects / w.sum()

    total = 0
    share = 0
    for a, b in zip(names[::2], names[1::2], strict=True):
        (n_a, mean_a), (n_b, mean_b) = kind(a), kind(b)
        balanced = n_a * n_b / (n_a + n_b)
        total += balanced * (mean_a + mean_b) / 2
        share += balanced
    return total / share


def test_contrasts_equal_a_loop_and_balance_both_mistakes_of_a_pair(run):
    effects = {name: (0.1 * i, 0.2 - 0.1 * i) for i, name in enumerate(CLASSES[:4])}
    tensors = simulate(np.random.default_rng(0), effects, cases=25)
    tensors |= simulate(np.random.default_rng(1), {"wall": (5.0, 5.0)})  # no building called wall
    write_knockout(run, tensors)
    contrasts = patch_contrasts(run, tensors)
    expected = mantel_haenszel(tensors, CLASSES[:4], np.ones(N))
    assert list(contrasts) == list(KNOCKOUT_EFFECTS)
    assert [x.value for x in contrasts.values()] == pytest.approx(expected.tolist(), abs=1e-6)
    patches = sum(int(tensors[f"{name}/patches"].sum()) for name in CLASSES[:4])
    assert contrasts["knockout_correct"].about["n"]["patches"] == patches
    assert contrasts["knockout_correct"].about["n"]["pairs"] == 2
    wider = [x.resampled[7].item() - x.value for x in contrasts.values()]
    loop = mantel_haenszel(tensors, CLASSES[:4], run.weights[7].numpy()) - expected
    ratio = np.divide(wider, loop)
    assert np.allclose(ratio, ratio[0]) and 1 < ratio[0] < 1.1, "Student's t"


def test_without_both_mistakes_or_enough_images_there_is_no_contrast(run):
    one_sided = simulate(np.random.default_rng(0), {"sky": (0.1, 0.2), "road": (0.1, 0.2)})
    assert set(knockout_effects(run, one_sided)) == set(KNOCKOUT_EFFECTS)
    few = simulate(np.random.default_rng(0), dict.fromkeys(CLASSES[:2], (0, 0)), cases=2)
    assert set(knockout_effects(run, few)) == set(KNOCKOUT_EFFECTS), "at most four images"


def test_effects_as_in_the_paper_are_means_over_cases_against_nothing_blocked(run):
    tensors = simulate(np.random.default_rng(0), {"sky": (-0.1, 0.2), "road": (0.3, 0.1)}, cases=25)

    def later(key):
        return torch.cat([tensors[f"{name}/{key}"][:, 3:].mean(1) for name in ("road", "sky")])

    effects_of_run = knockout_effects(run, tensors)
    for kind in ("incorrect", "correct"):
        expected = (later(kind) - later("none")).mean().item()
        effect = effects_of_run[f"knockout_{kind}"]
        assert effect.value == pytest.approx(expected, abs=1e-6)
        low, high = effect.ci95
        assert low < effect.value < high


def test_the_later_half_of_an_odd_number_of_layers_is_the_larger_one():
    assert later_half(torch.tensor([[0.0, 1, 2, 6]])).tolist() == [4]


def test_a_class_named_like_a_part_of_another_keeps_its_cases_together():
    """In the order of the keys, "a/b/..." stands between "a/image" and "a/none"."""
    tensors = {
        "a/image": torch.tensor([1, 2]),
        "a/b/image": torch.tensor([3]),
        "a/b/none": torch.full((1, 2), 3.0),
        "a/none": torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
    }
    cases = select_cases(tensors)
    assert cases["none"][:, 0].tolist() == cases["image"].tolist()


def test_groups_of_images_are_the_units():
    """The same cases in few cities are worth less than in as many images."""
    weights = bootstrap_weights(60, 400)
    cases = simulate_cases(np.random.default_rng(0), 60, [0.05])
    groups = (None, torch.arange(60), torch.arange(60) % 6)
    images, alone, cities = (
        contrast_estimates(cases, weights, x)[0].resampled.std() for x in groups
    )
    assert alone == images and cities > 1.2 * images


@pytest.mark.parametrize(
    "images",
    [12, pytest.param(25, marks=pytest.mark.nightly), pytest.param(60, marks=pytest.mark.nightly)],
)
def test_intervals_keep_their_level(images):
    """Two standard errors about the nominal 95% and 5%; pooled patches would take a criterion shift for an effect."""
    rng = np.random.default_rng(images)
    studied = [study(rng, images) for _ in range(STUDIES)]
    share = {
        key: np.mean([row[key] for row in studied])
        for key in ("covers", "shift", "pooled", "beyond")
    }
    assert share["covers"] >= 0.925 and share["beyond"] >= 0.925, share
    assert share["shift"] <= 0.075 < 0.12 < share["pooled"], share
