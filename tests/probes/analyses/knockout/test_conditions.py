"""Controls: what each of them keeps fixed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from probes.analyses.knockout import KnockoutOptions
from probes.analyses.knockout.cases import blocked_by_condition, find_cases, high_norm_tokens

T = 24
HIGH_NORM = np.arange(T) == 11


def blocked_of(
    high_norm=HIGH_NORM, draws=4, seed=0, incorrect=(7, 8, 13, 20), correct=(0, 1, 2, 3, 9)
) -> dict:
    """Return the tokens that are blocked in a case that has these sets."""
    tokens = {"incorrect": incorrect, "correct": correct}
    sets = {name: torch.isin(torch.arange(T), torch.tensor(x)) for name, x in tokens.items()}
    case = SimpleNamespace(image=5, wrong_class=1, blocked=sets)
    plan = KnockoutOptions(probes=Path("run"), classes=(), draws=draws, seed=seed)
    return blocked_by_condition(case, high_norm, plan)


def test_controls_block_as_many_tokens_and_none_of_high_norm_while_others_are_left():
    blocked_tokens = blocked_of()
    for name, count in (("incorrect", 4), ("correct", 5)):
        draws = torch.stack(blocked_tokens[f"random_{name}"])
        assert len(draws.unique(dim=0)) > 1, "draws differ"
        assert (draws.sum(1) == blocked_tokens[name][0].sum()).all() and blocked_tokens[name][
            0
        ].sum() == count
        assert not draws[:, 11].any()
    (draw,) = blocked_of(np.arange(T) > 1, draws=1)["random_correct"]
    assert draw[:2].all() and draw.sum() == 5


def test_another_seed_or_condition_draws_other_tokens():
    def drawn(condition="random_correct", seed=0):
        blocked_tokens = blocked_of(seed=seed, incorrect=(0, 1, 2, 3, 9))  # the same set
        return torch.stack(blocked_tokens[condition])

    assert torch.equal(drawn(), drawn())
    assert not torch.equal(drawn(), drawn(seed=1))
    assert not torch.equal(drawn(), drawn("random_incorrect"))


def test_tokens_of_high_norm_exceed_the_mean_by_two_standard_deviations():
    states = torch.ones(T, 8)
    states[11] *= 10
    assert (high_norm_tokens(states) == HIGH_NORM).all()


def test_blocked_tokens_can_be_those_of_another_layer_and_small_cases_are_left_out():
    """Two images of four patches at layers 0 and 1; class 1 is the wrong one. test_run.py has the paper's cases."""
    predicted = torch.tensor([[[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 0, 0, 2], [1, 1, 1, 1]]])
    truth = torch.tensor([[0, 2, 1, 2], [0, 0, 0, 0]])
    of_batch = (predicted, truth, [7, 8], 1)
    (case,) = find_cases(*of_batch)
    # of the true classes 0 and 2, once each, the first
    assert (case.image, case.patches, case.correct_class, case.anchors) == (7, 2, 0, 1)
    assert case.blocked["incorrect"].tolist() == [1, 1, 1, 0], "also the patch that is rightly 1"
    (later,) = find_cases(*of_batch, block_layer=1)
    assert later.blocked["incorrect"].tolist() == [1, 0, 0, 0]
    assert later.patches == 2
    assert not find_cases(*of_batch, min_patches=3)


def test_a_patch_without_a_label_is_never_a_wrong_one():
    """Of five patches, all are predicted as class 1 at both layers; the first and third are labelled otherwise."""
    predicted = torch.ones(2, 1, 5, dtype=torch.long)
    truth = torch.tensor([[0, -1, 2, 1, -1]])
    (case,) = find_cases(predicted, truth, index=[0], wrong_class=1)
    assert case.patches == 2
    assert case.mistaken.tolist() == [True, False, True, False, False]
    outcomes = case.outcomes(predicted[:, 0])
    assert outcomes["rate"].tolist() == [1, 1]
    assert outcomes["still_wrong"].tolist() == [1, 1]
