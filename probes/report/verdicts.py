"""Judge each claim in three columns. A claim is supported only if it holds in all of them.

    paper          as the paper measures it: probes trained with AdamW
    optimum        with solved probes: drop and recovery at every strength of regularisation whose probes have
                   converged, all else at the strength that cross-validation chose
    beyond_random  the claim's number minus that of random models which change the states as much

A verdict is "holds" if its 95% interval lies on the claimed side of zero, "reversed" if it lies on the other side, else
"does not hold". There is no verdict where it could not mean anything:

    not converged  No probes trained by `fit` or solved by `solve`. Trained probes that do not beat the constant
                   prediction, or that are further from the optimum than `CONVERGED_WITHIN`; without solved probes
                   nobody knows how far. Solved probes without certificates.
    no control     Fewer than two draws of random weights.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import scipy.stats
import torch

from llava_bidir.common.bootstrap import Estimate, interval
from probes.analyses.knockout.inference import mean_over_classes
from probes.models.sites import ADAPTER, ENCODER
from probes.results.probe_run import ProbeRun

from .effects import subtract
from .path import has_converged, neighbours

COLUMNS = ("paper", "optimum", "beyond_random")
HOLDS, FAILS, REVERSED = "holds", "does not hold", "reversed"
NOT_CONVERGED, NO_CONTROL = "not converged", "no control"

# One point of mIoU: about the smallest effect that the paper reads off its probes, the drop at CLIP's adapter (1.2 on
# ADE20K). Probes further than that from their optimum can make such an effect.
CONVERGED_WITHIN = 0.01
PAPER_STEPS = "the paper has 6,320 on ADE20K"


def judge(sign: int, ci95: Sequence[float]) -> str:
    """Return the verdict of an interval about a claim of this sign."""
    low, high = sorted(sign * bound for bound in ci95)
    return HOLDS if low > 0 else REVERSED if high < 0 else FAILS


def column(sign: int, value: float, ci95: Sequence[float], **more: Any) -> dict[str, Any]:
    """Return a column with a verdict."""
    return {"value": value, "ci95": list(ci95), "verdict": judge(sign, ci95)} | more


def no_verdict(
    verdict: str, reason: str, value: float | None = None, ci95: Sequence[float] | None = None, **more: Any
) -> dict[str, Any]:
    """Return a column without a verdict, and why."""
    return {"value": value, "ci95": None if ci95 is None else list(ci95), "verdict": verdict, "reason": reason} | more


def unconverged(run: ProbeRun, solved: ProbeRun | None, claim: str) -> str | None:
    """Return why the probes that a claim reads count as not converged; None if they have converged.

    `solved` is the same model's run of `probes solve`.
    """
    own = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
    layers = [site for site in own if site == ADAPTER or site.startswith("layer_")]
    sites = [site for site in (ENCODER, ADAPTER) if site in own] if claim == "adapter_drop" else layers
    if run.is_solved:
        return None if _certified(run, sites) else "solved probes have not converged at the strength that was chosen"
    steps = f"{run.metrics['probe'].get('steps', 0):,} steps; {PAPER_STEPS}"
    constant = run.metrics["baseline"]["miou"]
    if below := [site for site in sites if own[site] <= constant]:
        return f"{steps}; at {below[0]} not better than the constant prediction ({constant:.1%} mIoU)"
    best = {} if solved is None else {entry["site"]: entry["miou"] for entry in solved.metrics["sites"]}
    if missing := [site for site in sites if site not in best]:
        return f"{steps}; distance from the optimum unknown at {missing[0]}: run `probes solve`"
    distance, site = max((best[site] - own[site], site) for site in sites)
    if distance > CONVERGED_WITHIN:
        return f"{steps}; {100 * distance:.1f} points of mIoU below the optimum at {site}"
    return None


def _certified(run: ProbeRun, sites: list[str]) -> bool:
    """Return whether the solved probes of all sites, at the strengths that were chosen, have converged."""
    return has_converged(run, neighbours(run)["chosen"], [run.sites.index(site) for site in sites])


def path_column(sign: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the column "optimum" from an effect at each strength, with intervals that hold at all of them together.

    It is the row at the strength where the claim fares worst: only what holds there holds at every strength. Strengths
    whose probes have not converged do not count; "strengths" and "converged" say how many there are.
    """
    converged = [row for row in rows if row["converged"]]
    if not converged:
        return no_verdict(NOT_CONVERGED, "no strength has certificates of convergence at the sites of the claim")
    verdicts = [judge(sign, (row["low"], row["high"])) for row in converged]
    worst = min(converged, key=lambda row: min(sign * row["low"], sign * row["high"]))
    if set(verdicts) == {REVERSED}:  # the row that comes nearest to the claim
        worst = max(converged, key=lambda row: max(sign * row["low"], sign * row["high"]))
    count = {"strengths": len(rows), "converged": len(converged)}
    result = column(sign, worst["value"], (worst["low"], worst["high"]), row=worst["row"], **count)
    return result | {"verdict": verdicts[0] if len(set(verdicts)) == 1 else FAILS}


class Effect(NamedTuple):
    """The number of a claim, as the mean over units of equal weight."""

    by_unit: dict[str, Estimate]  # by class for a knockout; else one under ""
    counts: dict[str, int]  # of images, and of classes
    look_alikes: Mapping[str, Hashable] | None = None  # classes that are averaged first, by class

    @property
    def estimate(self) -> Estimate:
        """The estimate of an effect with one unit."""
        (estimate,) = self.by_unit.values()
        return estimate


def mean_effect(effect: Effect) -> tuple[float, list[float]]:
    """Return an effect's mean over its units and its 95% interval: over images for one unit, else over units too."""
    if len(effect.by_unit) == 1:
        return effect.estimate[0], interval(*effect.estimate)
    mean = mean_over_classes(effect.by_unit, effect.look_alikes)
    return mean["value"], mean["ci95"] or interval(mean["value"], _mean_estimate(effect.by_unit)[1])


def _mean_estimate(by_unit: Mapping[str, Estimate]) -> Estimate:
    values, resampled = zip(*by_unit.values(), strict=True)
    return sum(values) / len(values), torch.stack([drawn.double() for drawn in resampled]).nanmean(0)


def minus_draws(trained: Effect, draws: Sequence[Effect]) -> Effect:
    """Return trained minus the mean over draws of random weights, unit by unit, over the units that all have.

    Raises:
        ValueError: No unit is in all of them.
    """
    shared = [unit for unit in trained.by_unit if all(unit in draw.by_unit for draw in draws)]
    if not shared:
        raise ValueError("no class has enough cases in the trained model and in all draws")
    mean = {unit: _mean_estimate({str(i): d.by_unit[unit] for i, d in enumerate(draws)}) for unit in shared}
    return trained._replace(by_unit={unit: subtract(trained.by_unit[unit], mean[unit]) for unit in shared})


def compare_to_draws(sign: int, trained: Effect, draws: Sequence[Effect]) -> dict[str, Any]:
    """Return the column "beyond_random": the mean of :func:`minus_draws` with a 95% interval over units and draws.

    Its own interval, "ci95_without_draws", covers images and classes. Draws are independent of both: Student's t with
    D - 1 degrees of freedom for D draws. The two half widths are added as the sides of a right angle. Where either
    dominates, this is its own interval; Welch and Satterthwaite's degrees of freedom would cover 89% instead of 95% for
    two draws that differ. "trained" and "by_draw" are the numbers that are compared, over the same units.

    Raises:
        ValueError: No unit is in all of them.
    """
    difference = minus_draws(trained, draws)
    value, (low, high) = mean_effect(difference)
    of_shared = lambda effect: trained._replace(by_unit={unit: effect.by_unit[unit] for unit in difference.by_unit})
    own, *by_draw = (mean_effect(of_shared(effect))[0] for effect in (trained, *draws))
    half = scipy.stats.t.ppf(0.975, len(draws) - 1) * statistics.stdev(by_draw) / len(draws) ** 0.5
    ci95 = [value - math.hypot(half, value - low), value + math.hypot(half, high - value)]
    compared = {"draws": len(draws), "trained": own, "by_draw": by_draw}
    return column(sign, value, ci95, **compared, ci95_without_draws=[low, high])
