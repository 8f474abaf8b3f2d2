"""Controls: what each of them keeps fixed."""

from pathlib import Path

import numpy as np
import torch

from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import (
    ConfusionCase,
    blocked_by_condition,
    find_cases,
    high_norm_tokens,
)

T = 24
HIGH_NORM = np.arange(T) == 11


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


def blocked_of(case, high_norm, draws=4, seed=0) -> dict:
    plan = KnockoutOptions(probes=Path("run"), classes=(), draws=draws, seed=seed)
    return blocked_by_condition(case, high_norm, plan)


def test_controls_block_as_many_tokens_and_none_of_high_norm_while_others_are_left():
    case = case_of()
    for name, draws in blocked_of(case, HIGH_NORM).items():
        kind, _, of_set = name.rpartition("_")
        if kind:
            assert len(draws) == 4 and len({tuple(draw.tolist()) for draw in draws}) > 1, (
                "draws differ"
            )
            for draw in draws:
                assert draw.sum() == case.blocked[of_set].sum()
                assert not draw[11]
    (draw,) = blocked_of(case, np.arange(T) > 1, draws=1)["random_correct"]
    assert draw[:2].all() and draw.sum() == 5


def test_another_seed_or_condition_draws_other_tokens():
    case = case_of()
    case.blocked["incorrect"] = case.blocked["correct"]  # the same set, but different draws

    def drawn(condition="random_correct", seed=0):
        return torch.stack(blocked_of(case, HIGH_NORM, seed=seed)[condition])

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(seed=1))
    assert not torch.equal(drawn(), drawn("random_incorrect"))


def test_tokens_of_high_norm_exceed_the_mean_by_two_standard_deviations():
    states = torch.ones(T, 8)
    states[11] *= 10
    assert (high_norm_tokens(states) == HIGH_NORM).all()


def test_cases_follow_the_paper():
    """Two images of four patches at layers 0 and 1; class 1 is the wrong one."""
    predicted = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 0, 0, 2], [1, 1, 1, 1]]])
    truth = torch.tensor([[0, 2, 1, 2], [0, 0, 0, 0]])
    of_batch = (predicted, truth, [7, 8], 1)
    (case,) = find_cases(*of_batch)
    # of the true classes 0 and 2, once each, the first
    assert (case.image, case.patches, case.correct_class, case.anchors) == (7, 2, 0, 1)
    assert case.blocked["incorrect"].tolist() == [1, 1, 1, 0], "also the patch that is rightly 1"
    assert case.blocked["correct"].tolist() == [0, 0, 0, 1]
    (later,) = find_cases(*of_batch, block_layer=1)
    assert later.blocked["incorrect"].tolist() == [1, 0, 0, 0]
    assert later.patches == 2
    assert not find_cases(*of_batch, min_patches=3)
    outcomes = {name: values.tolist() for name, values in case.outcomes(predicted[:, 0]).items()}
    assert outcomes == {"rate": [1, 0.5], "still_wrong": [1, 0.5]}


def test_new_mistakes_count_in_the_rate_only():
    predicted = torch.tensor([[[1, 0, 0, 0]], [[0, 1, 1, 0]]])
    truth = torch.tensor([[0, 0, 0, -1]])
    (case,) = find_cases(predicted, truth, [7], wrong_class=1)
    outcomes = case.outcomes(predicted[:, 0])
    assert outcomes["rate"].tolist() == [1, 2]
    assert outcomes["still_wrong"].tolist() == [1, 0]
