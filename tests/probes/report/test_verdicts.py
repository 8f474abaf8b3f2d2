"""The three columns of a claim: verdicts and their margin, p-values, and intervals that cover images and draws."""

import math

import pytest
import scipy.stats
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.verdicts import (
    FEWEST_UNITS,
    MARGIN,
    compare_to_draws,
    detectable,
    find,
    judge,
    judge_draws,
    worst_of,
)
from probes.score.estimate import Estimate, p_value

STUDIES = 500


def test_judge():
    for sign, value, half, verdict in (
        (1, 0.15, 0.05, "holds"),
        (-1, 0.15, 0.05, "reversed"),
        (1, 0.05, 0.15, "does not hold"),
        (-1, -0.15, 0.05, "holds"),
        (1, 0.1, 0.1, "does not hold"),  # zero is not on the claimed side
        (1, 0.0099, 0.001, "does not hold"),
        (1, 0.01, 0.001, "holds"),
    ):
        column = judge(sign, value=value, ci95=[value - half, value + half], margin=MARGIN)
        assert column["verdict"] == verdict
        assert ("detectable" in column) == (verdict == "does not hold")


def test_p_values_are_those_of_t_and_invert_the_interval():
    sf = scipy.stats.t.sf
    assert p_value(1, 0.9, [(0.3, 4)]) == pytest.approx(2 * sf(3, 4), rel=1e-6)
    assert p_value(-1, -0.9, [(0.3, math.inf)]) == pytest.approx(2 * sf(3, math.inf), rel=1e-6)
    assert p_value(1, -0.9, [(0.3, 4)]) == 1
    parts = [(0.2, math.inf), (0.3, 2)]
    half = math.hypot(*(se * scipy.stats.t.ppf(0.975, df) for se, df in parts))
    assert p_value(1, half, parts) == pytest.approx(0.05, rel=1e-6)
    assert p_value(1, 1e9, parts[:1]) <= 1e-12


def column(low, high):
    """Of a normal estimate with this 90% interval."""
    middle, half = (low + high) / 2, (high - low) / 2 * 1.96 / 1.645
    return judge(
        1, value=middle, ci95=[middle - half, middle + half], margin=MARGIN, ci90=[low, high]
    )


THERE = column(0.03, 0.05)
ABSENT = column(-0.005, 0.006)
WIDE = column(-0.02, 0.03)


@pytest.mark.parametrize(
    ("optimum", "beyond_random", "conclusion", "finding", "decisive"),
    [
        (THERE, THERE, "supported", "supported", THERE),
        (THERE, ABSENT, "not learned", "not learned", ABSENT),
        (THERE, ABSENT, "also in random layers", "not learned", ABSENT),
        (THERE, column(-0.05, -0.03), "not learned", "not learned", None),
        (THERE, WIDE, "not learned", "undecided", WIDE),  # merely wide
        (ABSENT, WIDE, "does not hold", "no effect", ABSENT),
        (column(0.002, 0.008), ABSENT, "does not hold", "negligible", None),
        (column(-0.008, -0.002), ABSENT, "does not hold", "negligible", None),
        (column(-0.05, -0.011), WIDE, "does not hold", "reversed", None),
        (column(-0.05, -0.009), WIDE, "does not hold", "undecided", column(-0.05, -0.009)),
        (column(-0.009, 0.01), WIDE, "does not hold", "undecided", column(-0.009, 0.01)),
        (WIDE, THERE, "artefact of the instrument", "artefact of the instrument", None),
        (THERE, {"verdict": "untested"}, "untested", "untested", None),
        ({"verdict": "untested"}, THERE, "untested", "untested", None),
    ],
)
def test_a_finding_tells_absence_from_too_few_photos(
    optimum, beyond_random, conclusion, finding, decisive
):
    verdicts = {"optimum": optimum, "beyond_random": beyond_random}
    entry = find(1, verdicts, conclusion, margin=MARGIN, units=FEWEST_UNITS)
    assert entry["finding"] == finding
    assert ("detectable" in entry) == (finding == "undecided")
    few = find(1, verdicts, conclusion, margin=MARGIN, units=FEWEST_UNITS - 1)
    if finding == "untested":
        assert few == entry
        return
    assert few["finding"] == "undecided"
    if decisive:
        assert few["detectable"] == detectable(decisive["ci95"], MARGIN)
    mirrored = {}
    for name, of_claim in verdicts.items():
        ends = {key: sorted(-end for end in of_claim.get(key, ())) for key in ("ci90", "ci95")}
        mirrored[name] = of_claim | ends
    assert find(-1, mirrored, conclusion, margin=MARGIN, units=FEWEST_UNITS) == entry


def test_an_interval_that_shows_absence_is_students_for_each_count_of_photos():
    """Of photos, and of photos of a class."""
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = Estimate(0.5, values).widened([20, 5])
    factor = 1.0
    for count in (20, 5):
        factor *= scipy.stats.t.ppf(0.975, count - 1) / 1.96 * math.sqrt(count / (count - 1))
    assert (low + high) / 2 == pytest.approx(0.5)
    assert (high - low) / 2 == pytest.approx(1.645 * factor, rel=0.05)


def beyond(verdict, low, high, p):
    return {"value": (low + high) / 2, "ci95": [low, high], "verdict": verdict, "p": p}


HOLDS_LEAST = beyond("holds", low=0.02, high=0.06, p=0.01)
HOLDS_MORE = beyond("holds", low=0.03, high=0.05, p=0.001)
BELOW = beyond("does not hold", low=0.025, high=0.03, p=0.02)  # as of another margin
AGAINST = beyond("reversed", low=-0.06, high=-0.02, p=1.0)
FURTHER = beyond("reversed", low=-0.2, high=-0.1, p=1.0)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (HOLDS_MORE, HOLDS_LEAST, "holds"),
        (HOLDS_LEAST, BELOW, "does not hold"),
        (HOLDS_LEAST, AGAINST, "does not hold"),  # not reversed
        (FURTHER, AGAINST, "reversed"),  # by both
    ],
)
def test_the_column_that_decides_is_the_one_where_the_claim_fares_worst(first, second, verdict):
    """Of controls, and of strengths of regularisation; the second one each time."""
    columns = [first | {"control": "first"}, second | {"control": "second"}]
    entry = worst_of(1, columns)
    assert (entry["verdict"], entry["control"]) == (verdict, "second")
    assert entry["p"] == max(first["p"], second["p"])
    assert ("detectable" in entry) == (verdict == "does not hold")
    nearest = worst_of(-1, [x | {"verdict": "holds"} for x in (AGAINST, FURTHER)])
    assert nearest["value"] == AGAINST["value"]


def simulated(truth, spread, draws, generator):
    """A trained model's estimate and those of random draws: means over 50 images whose difficulty they share."""
    shared = torch.randn(50, generator=generator)
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    weights = bootstrap_weights(50, 400, seed=seed)
    means = [truth, *(spread * torch.randn(draws, generator=generator)).tolist()]
    samples = [mean + 0.5 * shared + 0.3 * torch.randn(50, generator=generator) for mean in means]
    trained, *random = [Estimate(x.mean().item(), weights @ x / weights.sum(1)) for x in samples]
    return trained, random


def nightly(*case):
    """A case of the nightly job; the fast one has two draws that vary most: Student's t with one degree of freedom."""
    return pytest.param(*case, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("spread", "draws", "masks"),
    [(0.3, 2, 1), nightly(0.0, 3, 1), nightly(0.05, 2, 2), nightly(0.05, 4, 1), nightly(0.3, 5, 2)],
)
def test_interval_over_images_and_draws_covers_the_truth(spread, draws, masks):
    """Judged alone, and with the draws under another mask; experiments/statistics/draws.py has more cases."""
    generator = torch.Generator().manual_seed(draws)
    truth = 0.1
    covered = 0
    for _ in range(STUDIES):
        first, *others = [
            compare_to_draws(*simulated(truth, spread=spread, draws=draws, generator=generator))
            for _ in range(masks)
        ]
        low, high = judge_draws(1, first, others, counts=(50,))["ci95"]
        covered += low <= truth <= high
    assert covered >= 0.93 * STUDIES, (
        f"{covered} of {STUDIES}; 95% are expected, 93% are two standard errors below"
    )
