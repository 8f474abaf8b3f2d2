"""Controls: what each of them keeps fixed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import ConfusionCase, find_cases
from probes.analyses.knockout.conditions import (
    MatchingFeatures,
    blocked_by_condition,
    matched_tokens,
)

GRID = (4, 6)
T = 24
CONTROLS = ["matched"]


def case_of(wrong=(7, 8, 13), incorrect=(7, 8, 13, 20), correct=(0, 1, 2, 3, 9)) -> ConfusionCase:
    def mask(tokens):
        return torch.isin(torch.arange(T), torch.tensor(tokens))

    blocked = {"incorrect": mask(incorrect), "correct": mask(correct)}
    return ConfusionCase(
        5,
        0,
        len(wrong),
        len(correct),
        1,
        2,
        mask(wrong),
        torch.full((T,), 2),
        blocked,
    )


def features_of(case: ConfusionCase, high=(11,)) -> MatchingFeatures:
    states = torch.ones(T, 8)
    states[list(high)] *= 10
    attention = torch.linspace(0, 1, T)[None]
    return MatchingFeatures.from_case(case, GRID, states, attention)


def blocked_of(case, features, **kwargs) -> dict:
    settings = {
        "controls": CONTROLS,
        "draws": 4,
        "seed": 0,
    } | kwargs
    return blocked_by_condition(
        case, features, KnockoutOptions(probes=Path("run"), classes=(), **settings)
    )


def test_features_equal_a_loop():
    case = case_of()
    features = features_of(case)
    for token in range(T):
        y, x = divmod(token, 6)
        distance = min(np.hypot(y - q // 6, x - q % 6) for q in (7, 8, 13))
        assert features.distance[token] == pytest.approx(distance)
    assert features.high_norm.nonzero()[0].tolist() == [11]


def test_controls_block_as_many_tokens_none_of_high_norm_and_none_of_the_set_if_matched():
    case = case_of()
    for name, draws in blocked_of(case, features_of(case)).items():
        kind, _, matched = name.rpartition("_")
        if kind:
            assert len(draws) == 4 and len({tuple(draw.tolist()) for draw in draws}) > 1, (
                "draws differ"
            )
            for draw in draws:
                assert draw.sum() == case.blocked[matched].sum()
                assert not draw[11]
                assert kind == "random" or not (draw & case.blocked[matched]).any()


def test_under_a_causal_mask_matched_tokens_are_seen_by_as_many_patches():
    """Tokens after all mistaken patches are seen by none of them, so blocking them has no effect."""
    case = case_of(
        wrong=(12, 13),
        incorrect=(12, 13),
        correct=(0, 1, 2, 3, 4),
    )
    features = features_of(case, high=())
    visibility = np.array([np.mean([token <= q for q in (12, 13)]) for token in range(T)])
    features = features._replace(mass=visibility / 14)  # all seen tokens alike
    blocked = blocked_of(case, features, draws=100)

    def seen(name):
        return np.mean([visibility[draw.numpy()].mean() for draw in blocked[name]])

    assert seen("correct") == 1
    assert seen("matched_correct") > 0.95
    assert seen("random_correct") < 0.7


def test_matched_in_both_finds_the_tokens_that_match_in_both():
    """Tokens 2-7 are twins of the blocked 0 and 1; 8-13 match in distance only, 14-23 in mass only."""
    distance = np.full(T, 3.0)
    mass = np.full(T, 0.001)
    distance[:14], mass[8:14] = 1, 0.9
    features = MatchingFeatures(distance, mass, np.zeros(T, dtype=bool))
    case = case_of(
        wrong=(23,),
        incorrect=(0, 1),
        correct=(0, 1),
    )
    blocked = blocked_of(case, features, draws=100)
    drawn = {
        name: set(np.flatnonzero(torch.stack(draws).any(0))) for name, draws in blocked.items()
    }
    assert drawn["matched_correct"] == drawn["matched_incorrect"] == set(range(2, 8))


def test_avoided_tokens_come_before_the_blocked_ones_when_others_run_out():
    features = np.zeros((4, 1))
    rng = np.random.default_rng(0)
    blocked = np.array([True, True, False, False])
    avoided = np.array([False, False, False, True])
    assert matched_tokens(features, blocked, avoided, rng).tolist() == [False, False, True, True]
    blocked = np.array([True, True, True, False])
    taken = matched_tokens(features, blocked, avoided, rng)
    assert taken.sum() == 3 and taken[3], "two of the blocked tokens are needed"


def test_a_condition_draws_by_itself():
    """The same seed draws the same tokens whatever else is asked for; another seed draws others."""
    case = case_of()
    features = features_of(case)
    few = blocked_of(case, features, controls=[])
    many = blocked_of(case, features)

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert all(same(draws, many[name]) for name, draws in few.items())
    assert not same(few["random_correct"], blocked_of(case, features, seed=1)["random_correct"])
    case.blocked["incorrect"] = case.blocked["correct"]  # the same set, but different draws
    equal = blocked_of(case, features)
    assert not same(equal["random_correct"], equal["random_incorrect"])


def test_cases_follow_the_paper():
    """Two images of four patches at layers 0 and 1; class 1 is the wrong one."""
    predicted = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 0, 0, 2], [1, 1, 1, 1]]])
    truth = torch.tensor([[0, 2, 1, 2], [0, 0, 0, 0]])
    (case,) = find_cases(predicted, truth, torch.tensor([7, 8]), wrong_class=1)
    assert (case.image, case.patches, case.correct_class) == (7, 2, 0), (
        "0 and 2 once each: the first"
    )
    assert case.blocked["incorrect"].tolist() == [
        True,
        True,
        True,
        False,
    ]  # also the patch that is correctly 1
    assert case.blocked["correct"].tolist() == [False, False, False, True]
    assert case.anchors == 1
    (later,) = find_cases(
        predicted,
        truth,
        torch.tensor([7, 8]),
        wrong_class=1,
        block_layer=1,
    )
    assert later.blocked["incorrect"].tolist() == [True, False, False, False]
    assert later.patches == 2
    assert not find_cases(
        predicted,
        truth,
        torch.tensor([7, 8]),
        wrong_class=1,
        min_patches=3,
    )
    outcomes = {name: values.tolist() for name, values in case.outcomes(predicted[:, 0]).items()}
    assert outcomes == {"rate": [1, 0.5], "still_wrong": [1, 0.5]}


def test_new_mistakes_count_in_the_rate_only():
    predicted = torch.tensor([[[1, 0, 0, 0]], [[0, 1, 1, 0]]])
    truth = torch.tensor([[0, 0, 0, -1]])
    (case,) = find_cases(predicted, truth, torch.tensor([7]), wrong_class=1)
    outcomes = case.outcomes(predicted[:, 0])
    assert outcomes["rate"].tolist() == [1, 2]
    assert outcomes["still_wrong"].tolist() == [1, 0]
