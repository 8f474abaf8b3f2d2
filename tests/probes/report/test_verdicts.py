"""The three columns of a claim: verdicts and their margin, p-values, and intervals that cover images and draws."""

import math

import pytest
import scipy.stats
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.verdicts import (
    MARGIN,
    compare_to_draws,
    judge,
    judge_draws,
    path_column,
    worst_of,
)
from probes.score.estimate import Estimate, p_value

STUDIES = 500


def test_judge():
    intervals = ([0.1, 0.2], [-0.1, 0.2], [-0.2, -0.1])

    def verdicts(sign):
        return [judge(sign, sum(x) / 2, x) for x in intervals]

    assert verdicts(1) == ["holds", "does not hold", "reversed"]
    assert verdicts(-1) == ["reversed", "does not hold", "holds"]
    assert judge(1, 0.1, [0.0, 0.2]) == "does not hold", "zero is not on the claimed side"

    def small(sign, value):
        return judge(sign, value, [value - 0.001, value + 0.001], MARGIN)

    assert [small(sign, 0.0099) for sign in (1, -1)] == ["does not hold"] * 2
    assert [small(sign, 0.01) for sign in (1, -1)] == ["holds", "reversed"]


def test_p_values_are_those_of_t_and_invert_the_interval():
    se = 0.3
    df = 4
    assert p_value(1, 0.9, [(se, df)]) == pytest.approx(
        2 * scipy.stats.t.sf(0.9 / se, df), rel=1e-6
    )
    assert p_value(-1, -0.9, [(se, math.inf)]) == pytest.approx(
        2 * scipy.stats.norm.sf(3), rel=1e-6
    )
    assert p_value(1, -0.9, [(se, df)]) == 1
    parts = [(0.2, math.inf), (0.3, 2)]
    half = math.hypot(0.2 * scipy.stats.norm.ppf(0.975), 0.3 * scipy.stats.t.ppf(0.975, 2))
    assert p_value(1, half, parts) == pytest.approx(0.05, rel=1e-6)
    assert p_value(1, 1e9, parts[:1]) <= 1e-12


def row(
    name,
    low,
    high,
    converged=True,
):
    return {
        "row": name,
        "value": (low + high) / 2,
        "low": low,
        "high": high,
        "converged": converged,
    }


def test_the_path_is_judged_where_the_claim_fares_worst():
    rows = [row("stronger", 0.04, 0.06), row("chosen", 0.015, 0.03), row("weaker", -0.01, 0.02)]
    entry = path_column(1, rows)
    assert (entry["verdict"], entry["row"], entry["ci95"]) == (
        "does not hold",
        "weaker",
        [-0.01, 0.02],
    )
    assert path_column(1, rows[:2])["verdict"] == "holds"
    assert path_column(1, rows[:2])["row"] == "chosen"
    assert path_column(-1, rows[:2])["verdict"] == "reversed"
    assert path_column(-1, rows[:2])["row"] == "chosen"
    turned = path_column(1, [row("stronger", -0.04, -0.02), rows[1]])
    assert turned["verdict"] == "does not hold" and turned["detectable"] > 0.01, (
        "holds at one, reversed at the other"
    )
    unsolved = [row("stronger", -0.04, -0.02, converged=False), rows[1]]
    assert path_column(1, unsolved)["verdict"] == "holds", (
        "a neighbour that has not converged says nothing"
    )
    counted = path_column(1, unsolved)
    assert (counted["converged"], counted["strengths"]) == (1, 2), (
        "but the column says how many strengths count"
    )
    below = [row("chosen", 0.004, 0.006), row("weaker", 0.02, 0.03)]
    assert path_column(1, below)["verdict"] == "does not hold", "below the margin at one of them"


def beyond(verdict, low, high, p):
    return {
        "value": (low + high) / 2,
        "ci95": [low, high],
        "verdict": verdict,
        "p": p,
    }


def worst(sign, columns):
    return worst_of(sign, [entry | {"control": name} for name, entry in columns.items()])


def test_the_control_that_decides_is_the_one_beyond_which_the_claim_fares_worst():
    holds = beyond("holds", 0.02, 0.06, 0.01)
    more = beyond("holds", 0.03, 0.05, 0.001)
    below = beyond("does not hold", 0.025, 0.03, 0.02)  # as of another margin
    against = beyond("reversed", -0.06, -0.02, 1.0)
    entry = worst(1, {"random": more, "permuted": holds})
    assert (entry["verdict"], entry["control"], entry["p"]) == ("holds", "permuted", 0.01)
    entry = worst(1, {"random": holds, "permuted": below})
    assert (entry["verdict"], entry["control"], entry["p"]) == ("does not hold", "permuted", 0.02)
    assert entry["detectable"] > 0.01
    entry = worst(1, {"random": holds, "permuted": against})
    assert (entry["verdict"], entry["control"]) == ("does not hold", "permuted"), "not reversed"
    worse = beyond("reversed", -0.2, -0.1, 1.0)
    entry = worst(1, {"random": worse, "permuted": against})
    assert (entry["verdict"], entry["control"]) == ("reversed", "permuted"), "reversed beyond both"
    falls = beyond("holds", -0.06, -0.02, 0.01)
    further = beyond("holds", -0.2, -0.1, 0.001)
    assert worst(-1, {"random": falls, "permuted": further})["control"] == "random"


def beyond_draws(trained, draws, others=()):
    entry = judge_draws(
        1, compare_to_draws(trained, draws), [compare_to_draws(*other) for other in others]
    )
    return entry["value"], entry["ci95"]


def simulated(
    truth,
    spread,
    draws,
    images,
    generator,
):
    """A trained model's estimate and those of random draws: means over images whose difficulty they share."""
    shared = torch.randn(images, generator=generator)
    weights = bootstrap_weights(
        images, 400, seed=int(torch.randint(1 << 30, (1,), generator=generator))
    )
    means = [truth, *(spread * torch.randn(draws, generator=generator)).tolist()]
    samples = [
        mean + 0.5 * shared + 0.3 * torch.randn(images, generator=generator) for mean in means
    ]
    trained, *draws = [Estimate(x.mean().item(), weights @ x / weights.sum(1)) for x in samples]
    return trained, draws


HARDEST = (0.3, 2, 1)  # two draws that vary most: Student's t with one degree of freedom
OTHERS = [
    (spread, draws, masks)
    for spread, draws in ((0.0, 3), (0.05, 2), (0.05, 4), (0.3, 2), (0.3, 5))
    for masks in (1, 2)
    if (spread, draws, masks) != HARDEST
]


@pytest.mark.parametrize(
    ("spread", "draws", "masks"),
    [HARDEST, *(pytest.param(*case, marks=pytest.mark.nightly) for case in OTHERS)],
)
def test_interval_over_images_and_draws_covers_the_truth(spread, draws, masks):
    """Judged alone, and with the draws under another mask; experiments/statistics/draws.py has more cases."""
    generator = torch.Generator().manual_seed(draws)
    truth = 0.1
    covered = 0
    for _ in range(STUDIES):
        first, *others = [simulated(truth, spread, draws, 50, generator) for _ in range(masks)]
        _, (low, high) = beyond_draws(*first, others)
        covered += low <= truth <= high
    assert covered >= 0.93 * STUDIES, (
        f"{covered} of {STUDIES}; 95% are expected, 93% are two standard errors below"
    )
