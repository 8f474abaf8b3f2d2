"""Effects against controls: estimates and tests, with and without a true effect."""

import itertools
import json

import numpy as np
import probe_runs
import pytest
import scipy.stats
import torch
from knockouts import CLASSES, simulate, write_knockout
from knockouts import N as IMAGES

from llava_bidir.common.bootstrap import bootstrap_weights, random_swaps
from probes.analyses.knockout.effects import (
    SPECIFICITY,
    Cases,
    effect_entries,
    later_half,
    mean_over_classes,
    select_cases,
)
from probes.evaluation.estimate import Estimate
from probes.results.probe_run import ProbeRun

N = 60
L = 4


def cases_of(shift: float, seed: int = 0) -> Cases:
    """Two cases per image; blocking the correct class adds `shift` at layers 3 and 4, all else is noise."""
    rng = np.random.default_rng(seed)
    images = torch.arange(N).repeat_interleave(2)

    def noise():
        return torch.tensor(rng.normal(0, 0.1, (2 * N, L + 1)))

    rates = {
        "none": 1 + noise(),
        "incorrect": 1 + noise(),
        "random_incorrect": 1 + noise(),
    }
    rates |= {"random_correct": 1 + noise(), "correct": 1 + noise()}
    rates["correct"][:, 3:] += shift
    for values in rates.values():
        values[:, 0] = 1
    return Cases(rates, images)


def entries(cases: Cases) -> dict[tuple[str, str], dict]:
    effects = effect_entries("all", cases, bootstrap_weights(N, 500), random_swaps(N, 500))
    return {(entry["condition"], entry["control"]): entry for entry in effects}


def test_every_condition_is_compared_with_none_and_its_own_control():
    assert set(entries(cases_of(0))) == {
        *(
            ("incorrect", "none"),
            ("correct", "none"),
            ("random_incorrect", "none"),
            ("random_correct", "none"),
        ),
        *(
            ("incorrect", "random_incorrect"),
            ("correct", "random_correct"),
            (SPECIFICITY, "random"),
        ),
    }


def test_estimates_are_plain_means():
    cases = cases_of(0.2)
    entry = entries(cases)["correct", "random_correct"]
    effect = (cases.rates["correct"] - cases.rates["random_correct"]).numpy()
    np.testing.assert_allclose(entry["mean"], effect.mean(0))
    assert entry["later"]["value"] == pytest.approx(effect[:, 3:].mean())
    contrast = effect - (cases.rates["incorrect"] - cases.rates["random_incorrect"]).numpy()
    np.testing.assert_allclose(entries(cases)[SPECIFICITY, "random"]["mean"], contrast.mean(0))


def test_effect_is_found_at_its_layers_only():
    entry = entries(cases_of(0.2))["correct", "random_correct"]
    assert len(entry["p"]) == L
    assert max(entry["p_corrected"][2:]) < 0.01 < min(entry["p_corrected"][:2])
    assert entry["later"]["ci95"][0] > 0.1
    assert entry["later"]["p"] < 0.01
    assert entry["ci95"][0] == [0, 0]
    assert all(c >= p for c, p in zip(entry["p_corrected"], entry["p"], strict=True))


@pytest.mark.slow
def test_false_positives_have_their_nominal_rate():
    """Without an effect, any of the layers falls below 5% in about one of twenty experiments."""
    alarms = [
        min(entries(cases_of(0, seed))["correct", "random_correct"]["p_corrected"]) < 0.05
        for seed in range(200)
    ]
    assert 0.01 < np.mean(alarms) < 0.10


def test_cases_of_one_image_are_swapped_together():
    """Two identical cases per image carry no more evidence than one."""
    cases = cases_of(0.02)
    once = Cases({name: rates[::2] for name, rates in cases.rates.items()}, cases.images[::2])
    twice = Cases(
        {name: rates[::2].repeat_interleave(2, 0) for name, rates in cases.rates.items()},
        cases.images,
    )
    for a, b in zip(entries(once).values(), entries(twice).values(), strict=True):
        np.testing.assert_allclose(a["p"], b["p"])
        np.testing.assert_allclose(a["ci95"], b["ci95"], atol=1e-9)


def test_later_half_is_the_later_half_of_the_layers():
    assert later_half(torch.tensor([[0.0, 1, 2, 3, 5]])).tolist() == [4]
    assert later_half(torch.tensor([[0.0, 1, 2, 6]])).tolist() == [4]


def test_cases_of_some_classes():
    tensors = {
        **{
            "a/b/patches": torch.tensor([1, 5]),
            "a/b/image": torch.tensor([3, 4]),
            "a/b/none": torch.eye(2),
        },
        **{
            "c/patches": torch.tensor([7]),
            "c/image": torch.tensor([9]),
            "c/none": torch.ones(1, 2),
        },
        **{"c/balance:none": torch.zeros(1, 5), "c/still_wrong:none": torch.zeros(1, 2)},
    }
    assert select_cases(tensors).images.tolist() == [3, 4, 9]
    assert list(select_cases(tensors).rates) == ["none"]
    assert select_cases(tensors, ["a/b"]).images.tolist() == [3, 4], "a name with a slash"
    assert select_cases({}) is None
    assert select_cases(tensors, ["x"]) is None


def test_a_class_named_like_a_part_of_another_keeps_its_cases_together():
    """In the order of the keys, "a/b/..." stands between "a/image" and "a/none"."""
    tensors = {
        "a/image": torch.tensor([1, 2]),
        "a/b/image": torch.tensor([3]),
        "a/b/none": torch.full((1, 2), 3.0),
        "a/none": torch.tensor([[1.0, 1.0], [2.0, 2.0]]),
    }
    cases = select_cases(tensors)
    assert cases.rates["none"][:, 0].tolist() == cases.images.tolist()


# -------------------------------------------------------------------------------------------------------- over classes
@pytest.fixture
def run(tmp_path) -> ProbeRun:
    """A run on 40 images of a grid of 2 x 2 patches, without a model."""
    (tmp_path / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    return ProbeRun(
        probe_runs.write_run(tmp_path / "run", [0.6, 0.5, 0.6, 0.5], root=tmp_path, images=IMAGES)
    )


def test_p_values_are_those_of_all_swaps_and_corrected_by_holm(run):
    """Each class has 9 images, so that all 2^9 swaps of condition and control can be made."""
    tensors = simulate(
        np.random.default_rng(1), {name: (0.15 * i, 0.1) for i, name in enumerate(CLASSES)}, cases=9
    )
    results = write_knockout(run, tensors)
    rows = [
        row
        for row in results["effects"]
        if (row["condition"], row["control"]) == ("incorrect", "none")
    ]
    pooled, *rows = rows
    assert [row["class"] for row in rows] == CLASSES
    assert pooled["later"]["p_holm"] is None
    for row in rows:
        name = row["class"]
        effect = (
            (tensors[f"{name}/incorrect"] - tensors[f"{name}/none"])[:, 3:].double().mean(1).numpy()
        )
        swapped = [abs(np.mean(effect * signs)) for signs in itertools.product((1, -1), repeat=9)]
        exact = np.mean(np.array(swapped) >= abs(effect.mean()) - 1e-12)
        assert row["later"]["p"] == pytest.approx(exact, abs=4 * np.sqrt(exact / 2000) + 0.001)
    smallest = 0.0
    for i, later in enumerate(sorted((row["later"] for row in rows), key=lambda later: later["p"])):
        smallest = max(smallest, min(1, (len(rows) - i) * later["p"]))
        assert later["p_holm"] == pytest.approx(smallest)


@pytest.mark.parametrize(("groups", "tested"), [(3, 0), (6, len(CLASSES))])
def test_a_class_in_few_groups_of_images_is_not_tested(
    groups,
    tested,
    run,
    tmp_path,
):
    """Swapping three cities can never give p < 0.05, so that no verdict would say anything."""
    options = {
        "root": tmp_path,
        "images": IMAGES,
        "groups": torch.arange(IMAGES) % groups,
    }
    run = ProbeRun(probe_runs.write_run(tmp_path / "cities", [0.6, 0.5, 0.6, 0.5], **options))
    results = write_knockout(
        run, simulate(np.random.default_rng(10), dict.fromkeys(CLASSES, (-0.4, 0.4)))
    )
    corrected = {row["class"] for row in results["effects"] if row["later"]["p_holm"] is not None}
    assert len(corrected) == tested
    assert results["too_few_images"] == (CLASSES if tested == 0 else [])


def test_interval_over_classes_is_students_t_and_never_shorter_than_over_images():
    """The classes' spread decides where it is large, the images' where it is small; scipy and numpy as references."""
    rng = np.random.default_rng(3)
    values = rng.normal(0.1, 1, 6)
    noise = rng.normal(0, 0.01, (6, 500))
    mean = mean_over_classes(
        {
            str(i): Estimate(v, torch.tensor(v + e))
            for i, (v, e) in enumerate(zip(values, noise, strict=True))
        }
    )
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean["ci95"] == pytest.approx([expected.low, expected.high])
    assert (mean["value"], mean["sd"]) == pytest.approx((values.mean(), values.std(ddof=1)))
    assert mean["units"] == 6
    shared = rng.normal(
        0, 1, 500
    )  # images that all classes share: their errors do not cancel in the mean
    mean = mean_over_classes({str(i): Estimate(0.1, torch.tensor(0.1 + shared)) for i in range(6)})
    half = scipy.stats.t.ppf(0.975, 5) * shared.std(ddof=1)
    assert mean["ci95"] == pytest.approx([0.1 - half, 0.1 + half])
    drawn = torch.tensor(
        [[1.0, 2.0, torch.nan, 4.0], [3.0, 1.0, 2.0, torch.nan]]
    )  # resamplings without a class
    half = scipy.stats.t.ppf(0.975, 1) * np.std([2, 1.5, 2, 4], ddof=1)
    assert mean_over_classes({"a": Estimate(0.0, drawn[0]), "b": Estimate(0.0, drawn[1])})[
        "ci95"
    ] == pytest.approx([-half, half])
    assert mean_over_classes({"a": Estimate(0.5, drawn[0])}) == {
        "value": 0.5,
        "ci95": None,
        "units": 1,
        "sd": None,
    }
    assert mean_over_classes({})["value"] is None


def test_random_effects_hold_by_chance_at_their_nominal_rate():
    """One side of a 95% interval: 2.5% of 500 draws, in which effects vary about zero, with images' noise on top."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        values = rng.normal(0, 1, 6) + rng.normal(0, 0.3, 6)
        estimates = {
            str(i): Estimate(v, torch.tensor(v + rng.normal(0, 0.3, 200)))
            for i, v in enumerate(values)
        }
        held += mean_over_classes(estimates)["ci95"][0] > 0
    assert held <= 25
