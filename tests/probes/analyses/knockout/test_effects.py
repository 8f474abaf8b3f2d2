"""Effects against controls: estimates and tests, with and without a true effect."""

import numpy as np
import pytest
import torch

from llava_bidir.common.bootstrap import bootstrap_weights, random_swaps
from probes.analyses.knockout.effects import SPECIFICITY, Cases, effect_entries, later_half, select_cases

N, L = 60, 4


def cases_of(shift: float, seed: int = 0) -> Cases:
    """Two cases per image; blocking the correct class adds `shift` at layers 3 and 4, all else is noise."""
    rng = np.random.default_rng(seed)
    images = torch.arange(N).repeat_interleave(2)
    noise = lambda: torch.tensor(rng.normal(0, 0.1, (2 * N, L + 1)))
    rates = {"none": 1 + noise(), "incorrect": 1 + noise(), "random_incorrect": 1 + noise()}
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
        *(("incorrect", "none"), ("correct", "none"), ("random_incorrect", "none"), ("random_correct", "none")),
        *(("incorrect", "random_incorrect"), ("correct", "random_correct"), (SPECIFICITY, "random")),
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
    assert len(entry["p"]) == L and max(entry["p_corrected"][2:]) < 0.01 < min(entry["p_corrected"][:2])
    assert entry["later"]["ci95"][0] > 0.1 and entry["later"]["p"] < 0.01
    assert entry["ci95"][0] == [0, 0] and all(c >= p for c, p in zip(entry["p_corrected"], entry["p"], strict=True))


@pytest.mark.slow
def test_false_positives_have_their_nominal_rate():
    """Without an effect, any of the layers falls below 5% in about one of twenty experiments."""
    alarms = [min(entries(cases_of(0, seed))["correct", "random_correct"]["p_corrected"]) < 0.05 for seed in range(200)]
    assert 0.01 < np.mean(alarms) < 0.10


def test_cases_of_one_image_are_swapped_together():
    """Two identical cases per image carry no more evidence than one."""
    cases = cases_of(0.02)
    once = Cases({name: rates[::2] for name, rates in cases.rates.items()}, cases.images[::2])
    twice = Cases({name: rates[::2].repeat_interleave(2, 0) for name, rates in cases.rates.items()}, cases.images)
    for a, b in zip(entries(once).values(), entries(twice).values(), strict=True):
        np.testing.assert_allclose(a["p"], b["p"])
        np.testing.assert_allclose(a["ci95"], b["ci95"], atol=1e-9)


def test_later_half_is_the_later_half_of_the_layers():
    assert later_half(torch.tensor([[0.0, 1, 2, 3, 5]])).tolist() == [4]
    assert later_half(torch.tensor([[0.0, 1, 2, 6]])).tolist() == [4]


def test_cases_of_some_classes_with_enough_patches():
    tensors = {
        **{"a/b/patches": torch.tensor([1, 5]), "a/b/image": torch.tensor([3, 4]), "a/b/none": torch.eye(2)},
        **{"c/patches": torch.tensor([7]), "c/image": torch.tensor([9]), "c/none": torch.ones(1, 2)},
        "c/balance:none": torch.zeros(1, 5),
    }
    assert select_cases(tensors).images.tolist() == [3, 4, 9]
    assert select_cases(tensors, 4).images.tolist() == [4, 9] and list(select_cases(tensors).rates) == ["none"]
    assert select_cases(tensors, 1, ["a/b"]).images.tolist() == [3, 4], "a name with a slash"
    assert select_cases(tensors, 8) is None and select_cases({}) is None and select_cases(tensors, 1, ["x"]) is None
