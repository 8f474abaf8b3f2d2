"""Judge each claim in three columns, and draw one conclusion from them.

    paper          as the paper measures it: probes trained with AdamW, whatever their distance from the optimum; of a
                   knockout, the rate of wrong patches. "below_optimum" is how much larger the same effect is at the
                   optimum, with an interval; no verdict depends on it
    optimum        with solved probes: drop and recovery at the chosen strength of regularisation and its neighbours,
                   all else at the chosen one; of a knockout, per mistaken patch and against other tokens
    beyond_random  the claim's number minus that of models with random weights. There are two kinds of random LLMs (of
                   an encoder: layers), those that change the states as much and those with the trained weights in
                   random order; the column is of the kind beyond which the claim fares worst

A verdict is "holds" if the 95% interval lies on the claimed side of zero, "reversed" if it lies on the other side, else
"does not hold". In the last two columns the value must also be at least the task's margin. A column whose runs are
missing is "untested", and its "reason" names the command to run.

    supported                   holds at the optimum and beyond random
    artefact of the instrument  holds as the paper measures it, but not at the optimum
    not learned                 holds at the optimum and, if measured, as the paper does, but not beyond random
    does not hold               all else
    untested                    one of these two columns is untested, and the other one does not decide: "supported" is
                                then neither true nor false, but null

Some claims have a word of their own for "not learned", as "also in random layers" (`Claim.unlearned`).

"Does not hold" can be that nothing is there, or that the photos are too few. The page and the terminal print the
"finding", which tells the two apart by the 90% interval "ci90" of a column, as two one-sided tests at 5% do; it is
widened for few photos, and beyond random holds for both kinds together:

    supported            as above; "supported by itself" where the correction for all claims about a model, seed and
                         task (Holm) undoes it
    not learned          it holds at the optimum, and beyond random the interval is below the margin
    no effect            at the optimum the interval is within the margin, on both sides of 0
    negligible           the same, and it excludes 0
    reversed             at the optimum the interval is beyond the margin on the other side
    undecided            all else, and all of fewer than `FEWEST_UNITS` photos; "detectable" is the smallest effect that
                         80% of such studies find
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llava_bidir.common.bootstrap import holm
from probes.runs.formatting import Entry
from probes.score.estimate import (
    Estimate,
    normal_quantile,
    p_value,
    standard_error,
    student_quantile,
)
from probes.tasks import SEGMENTATION, TASKS

VERDICT_COLUMNS = ("paper", "optimum", "beyond_random")
HOLDS = "holds"
FAILS = "does not hold"
REVERSED = "reversed"
UNTESTED = "untested"
SUPPORTED = "supported"
SUPPORTED_BY_ITSELF = "supported by itself"
ARTEFACT = "artefact of the instrument"
NOT_LEARNED = "not learned"
NO_EFFECT = "no effect"
NEGLIGIBLE = "negligible"
UNDECIDED = "undecided"

# The smallest effect that is a finding, of claims about classes: a point of mIoU, accuracy, or of patches left wrong.
MARGIN = TASKS[SEGMENTATION].margin
ALPHA = 0.05  # level of p-values
POWER = 0.8  # at which an effect counts as detectable
FEWEST_UNITS = 10  # photos, or groups of these: of fewer, intervals are too short to say anything


def untested(
    reason: str, value: float | None = None, ci95: Sequence[float] | None = None, **more: Any
) -> Entry:
    """Return a column without a verdict: the reason, and its number if it has one."""
    return {"value": value, "ci95": ci95, "verdict": UNTESTED, "reason": reason, **more}


def judge(
    sign: int,
    value: float,
    ci95: Sequence[float],
    margin: float = 0.0,
    df: float = math.inf,
    **more: Any,
) -> Entry:
    """Return a column: its verdict with "p", and if it "does not hold", the smallest effect that is "detectable".

    Args:
        sign: Of the claim.
        value: Centre of the interval.
        ci95: Of Student's t with `df` degrees of freedom.
        margin: Smallest value that counts.
        df: Infinite for an interval over images.
        more: Further entries.
    """
    low, high = sorted(sign * bound for bound in ci95)
    verdict = REVERSED
    if low > 0:
        verdict = HOLDS
    if abs(value) < margin or low <= 0 <= high:
        verdict = FAILS
        more["detectable"] = detectable(ci95, margin)
    return {
        "value": value,
        "ci95": list(ci95),
        "verdict": verdict,
        "p": p_value(sign, value, [standard_error(ci95, df)]),
        **more,
    }


def detectable(ci95: Sequence[float], margin: float) -> float:
    """Return the effect that is found in 80% of studies with intervals of this length."""
    half = (ci95[1] - ci95[0]) / 2
    return max(half, margin) + normal_quantile(POWER) * half / normal_quantile(0.975)


def conclude(verdicts: dict[str, Entry], unlearned: str) -> Entry:
    """Return "conclusion"; "supported", None if it is untested, and then the "reason"; and the "p" of both columns.

    `unlearned` is the conclusion about an effect that random models have as much.
    """
    paper, *needed = (verdicts[name] for name in VERDICT_COLUMNS)
    optimum, beyond = (entry["verdict"] for entry in needed)
    missing = [entry["reason"] for entry in needed if entry["verdict"] == UNTESTED]
    p = None
    if not missing:
        p = max(entry["p"] for entry in needed)
    if optimum == UNTESTED or (optimum == HOLDS and beyond == UNTESTED):
        return {"supported": None, "conclusion": UNTESTED, "reason": missing[0], "p": p}
    if optimum != HOLDS:
        conclusion = FAILS
        if paper["verdict"] == HOLDS:
            conclusion = ARTEFACT
    elif beyond == HOLDS:
        conclusion = SUPPORTED
    elif paper["verdict"] in (FAILS, REVERSED):
        conclusion = FAILS
    else:
        conclusion = unlearned
    return {"supported": conclusion == SUPPORTED, "conclusion": conclusion, "p": p}


def find(
    sign: int, verdicts: dict[str, Entry], conclusion: str, *, margin: float, units: int
) -> Entry:
    """Return the "finding" of a claim from so many photos or groups of these, and what is "detectable" if undecided."""
    if conclusion == UNTESTED:
        return {"finding": UNTESTED}
    column = verdicts["optimum"]
    holds = column["verdict"] == HOLDS
    if holds:
        column = verdicts["beyond_random"]
    low, high = sorted(sign * bound for bound in column["ci90"])
    finding = equivalence([low, high], margin)
    if holds:
        finding = UNDECIDED
        if high < margin:
            finding = NOT_LEARNED
    elif high < -margin:
        finding = REVERSED
    if conclusion in (SUPPORTED, ARTEFACT):
        finding = conclusion
    if finding == UNDECIDED or units < FEWEST_UNITS:
        return {"finding": UNDECIDED, "detectable": detectable(column["ci95"], margin)}
    return {"finding": finding}


def equivalence(ci90: Sequence[float], margin: float) -> str:
    """Return whether a 90% interval shows that there is no effect, or a negligible one; else it is undecided."""
    low, high = ci90
    if low <= -margin or high >= margin:
        return UNDECIDED
    if low > 0 or high < 0:
        return NEGLIGIBLE
    return NO_EFFECT


def correct_for_claims(claims: list[Entry]) -> None:
    """Add "p_holm": "p" corrected for the number of claims that have one (Holm), and to the finding what it undoes."""
    tested = [claim for claim in claims if claim["p"] is not None]
    corrected = iter(holm([claim["p"] for claim in tested]))
    for claim in claims:
        claim["p_holm"] = None
        if claim["p"] is not None:
            claim["p_holm"] = next(corrected)
        if claim["finding"] == SUPPORTED and claim["p_holm"] >= ALPHA:
            claim["finding"] = SUPPORTED_BY_ITSELF


def worst_of(sign: int, columns: Sequence[Entry], margin: float = MARGIN) -> Entry:
    """Return the column where a claim fares worst, with the largest "p" of all.

    A claim that holds in some only does not hold. Of columns that are all reversed, it is the nearest to the claim.
    """

    def lowest(entry: Entry) -> float:
        return min(sign * bound for bound in entry["ci95"])

    verdicts = {entry["verdict"] for entry in columns}
    failing = [entry for entry in columns if entry["verdict"] != HOLDS]
    worst = min(failing or columns, key=lowest)
    if verdicts == {REVERSED}:
        worst = max(columns, key=lowest)
    result = worst | {"p": max(entry["p"] for entry in columns)}
    if len(verdicts) > 1:
        result |= {"verdict": FAILS, "detectable": detectable(result["ci95"], margin)}
    return result


def compare_to_draws(trained: Estimate, draws: Sequence[Estimate]) -> Estimate:
    """Return a trained model's number minus the mean of draws of random weights, over images.

    It is about the numbers that are compared, "trained" and "by_draw".
    """
    about = {"trained": trained.value, "by_draw": [draw.value for draw in draws]}
    return replace(trained - Estimate.mean(draws), about=about)


def interval_over_draws(
    compared: Estimate, others: Sequence[Estimate] = (), counts: Sequence[float] = ()
) -> tuple[list[float], tuple[float, float]]:
    """Return the 95% interval over images and draws, and the standard error and degrees of freedom of draws.

    With `counts` it is one that can show that nothing is there (:meth:`Estimate.widened`): at 95%, since it is looked
    for in two kinds of random models.

    The own interval of what :func:`compare_to_draws` returns covers images. The draws add Student's t. Their variance
    is pooled with `others`: the same claim under other masks or beyond other random weights, whose degrees of freedom
    add up. It is never below that of the own draws, so that a mask with twice the spread keeps its level. Pooled over
    claims as well, such a cell would not (`experiments/statistics/draws.py`: 91%). Both half widths are added as the
    sides of a right angle; Welch and Satterthwaite's degrees of freedom would cover 89% instead of 95% for two draws
    that differ.
    """
    low, high = compared.ci95
    if counts:
        low, high = compared.widened(counts, level=0.95)
    value = compared.value
    by_draw = [x.about["by_draw"] for x in (compared, *others)]
    df = sum(len(numbers) - 1 for numbers in by_draw)
    squares = [statistics.variance(numbers) * (len(numbers) - 1) for numbers in by_draw]
    variance = max(statistics.variance(by_draw[0]), sum(squares) / df)
    error = (variance / len(by_draw[0])) ** 0.5
    half = student_quantile(0.975, df) * error
    bounds = [value - math.hypot(half, value - low), value + math.hypot(half, high - value)]
    return bounds, (error, df)


def judge_draws(
    sign: int,
    compared: Estimate,
    others: Sequence[Estimate] = (),
    *,
    margin: float = MARGIN,
    counts: Sequence[float],
) -> Entry:
    """Return the column "beyond_random" beside draws, from `counts` of images (:meth:`Estimate.widened`).

    Its "ci95_without_draws" is the interval over images alone.
    """
    over_images = compared.ci95
    ci95, of_draws = interval_over_draws(compared, others)
    ci90, _ = interval_over_draws(compared, others, counts)
    errors = [standard_error(over_images), of_draws]
    return judge(
        sign,
        value=compared.value,
        ci95=ci95,
        ci90=ci90,
        margin=margin,
        draws=len(compared.about["by_draw"]),
        **compared.about,
        df_of_draws=of_draws[1],
        p=p_value(sign, compared.value, errors),
        ci95_without_draws=over_images,
    )
