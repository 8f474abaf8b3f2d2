"""Measure each claim: the differences of effects that the runs of a study and their analyses wrote.

Effects are vectors of a number and its resamplings (probes/analyses/claims.py). All use the same resamplings of the
study's validation images, so differences between sites, masks and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (probes/score/layer_effects.py). The paper
chooses it on the images that it is scored on, which favours models with many layers; tables keep that definition.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from probes.analyses.claims import ANALYSIS_OF, CLAIMS, read_effects
from probes.runs.comparable import check_pair, knockout_difference
from probes.runs.finished_run import FinishedRun
from probes.runs.study import CONTROLS, MASKS, UNTRAINED, StudyRuns, by_mask
from probes.score.estimate import Estimate

from .verdicts import compare_to_draws

log = logging.getLogger(__name__)

KNOCKOUT = "knockout"  # the analysis

Key = tuple[str, str]  # claim, mask


class Number(NamedTuple):
    """The number of a claim in a model."""

    paper: Estimate  # as the paper measures it
    judged: (
        Estimate | None
    )  # at the optimum and beyond random; None for a knockout without a contrast


class Measured(NamedTuple):
    """The numbers of a study from probes of one kind."""

    trained: dict[Key, Number]
    untrained: dict[Key, Number]  # of the model before training
    # the trained model's minus the mean of random draws, by claim, mask and control
    beyond_random: dict[tuple[str, str, str], Estimate]


def measure_study(study: StudyRuns) -> dict[bool, Measured]:
    """Return the numbers from solved probes under True; under False from trained ones, if the main runs have these."""
    effects = {run.path: read_effects(run) for run in study.members}
    kinds = {True, study.is_solved}
    return {
        solved: _measure_kind(
            study,
            solved,
            effects,
        )
        for solved in kinds
    }


def _measure_kind(
    study: StudyRuns,
    solved: bool,
    effects: Mapping[Path, Mapping[str, Estimate]],
) -> Measured:
    runs = by_mask(study.where(arm="trained", solved=solved))
    site = next((run.peak_layer for run in runs.values()), None)

    def measure(runs: Mapping[str, FinishedRun]) -> dict[Key, Number]:
        return measure_runs(
            runs,
            effects,
            site,
        )

    trained = {
        (claim, mask): number
        for (claim, mask), number in measure(runs).items()
        if CLAIMS[claim].applies is None or CLAIMS[claim].applies(runs)
    }
    before = by_mask(study.where(arm=UNTRAINED, solved=solved))
    untrained = measure({mask: run for mask, run in before.items() if mask in runs})
    _add_recovery_trained(trained, untrained)
    draws = {
        control: [measure(draw) for draw in study.draws(control, solved=solved)]
        for controls in CONTROLS.values()
        for control in controls
    }
    beyond_random = {}
    for (claim, mask), number in trained.items():
        for control in CONTROLS[random_part(claim)]:
            if not number.judged or other_knockouts(
                study,
                claim,
                mask,
                control,
                solved,
            ):
                continue
            numbers = [draw[claim, mask].judged for draw in draws[control] if (claim, mask) in draw]
            if len(numbers) >= 2 and all(numbers):
                beyond_random[claim, mask, control] = compare_to_draws(number.judged, numbers)
    return Measured(
        trained,
        untrained,
        beyond_random,
    )


def random_part(claim: str) -> str:
    """Return what is random in the controls of a claim."""
    return "adapter" if claim == "adapter_drop" else "llm"


def other_knockouts(
    study: StudyRuns,
    claim: str,
    mask: str,
    control: str,
    solved: bool,
) -> str | None:
    """Return why the knockouts of a control are not comparable with the trained one's; None for other claims."""
    trained = study.where(
        arm="trained",
        mask=mask,
        solved=solved,
    )
    if ANALYSIS_OF.get(claim) != KNOCKOUT or not trained:
        return None
    draws = [draw[mask] for draw in study.draws(control, solved=solved) if mask in draw]
    return next(filter(None, (knockout_difference(trained[0], run) for run in draws)), None)


def _add_recovery_trained(trained: dict[Key, Number], untrained: dict[Key, Number]) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, under the masks that both have."""
    for claim, mask in list(trained):
        if claim == "recovery" and (claim, mask) in untrained:
            difference = trained[claim, mask].judged - untrained[claim, mask].judged
            trained["recovery_trained", mask] = Number(difference, difference)


def measure_runs(
    runs: Mapping[str, FinishedRun],
    effects: Mapping[Path, Mapping[str, Estimate]],
    site: str | None,
) -> dict[Key, Number]:
    """Return the number of each claim from runs of one kind.

    Args:
        runs: By mask.
        effects: The effects of each run by name, by its folder.
        site: Where the masks are compared: the best layer of the trained model, for its controls too; or nowhere.
    """
    numbers: dict[Key, Number] = {}
    for mask, run in runs.items():
        of_run = effects[run.path]
        for name, claim in CLAIMS.items():
            if name not in of_run:
                continue
            paper = judged = _about_run(of_run[name], run)
            if claim.against_tokens:
                contrast = of_run.get(f"{name}@random")
                judged = contrast and _about_run(contrast, run)
            numbers[name, mask] = Number(paper, judged)
    pair = [runs[mask] for mask in MASKS if mask in runs]
    both = len(pair) == 2 and pair[0].is_solved == pair[1].is_solved
    if both and all(site in run.sites for run in pair):
        check_pair(*pair)
        numbers |= _differences_of_masks(
            *pair,
            effects,
            site,
        )
    return numbers


def _about_run(estimate: Estimate, run: FinishedRun) -> Estimate:
    """Return an estimate that says what it is a mean over: of a run's own scores, the images."""
    count = {"images": run.metrics["images"]}
    if run.groups is not None:
        count["groups"] = len(run.groups.unique())
    return replace(estimate, about={"n": count} | dict(estimate.about))


def _differences_of_masks(
    causal: FinishedRun,
    bidirectional: FinishedRun,
    effects: Mapping[Path, Mapping[str, Estimate]],
    site: str,
) -> dict[Key, Number]:
    """Return the claims that are differences of masks, from the effects of both runs at a site."""
    numbers = {}
    of_causal, of_bidirectional = (effects[run.path] for run in (causal, bidirectional))
    for name, claim in CLAIMS.items():
        effect = f"{claim.between_masks}@{site}"
        if effect not in of_causal or effect not in of_bidirectional:
            continue
        difference = _about_run(of_bidirectional[effect] - of_causal[effect], causal)
        if math.isnan(difference.value):  # e.g. the padding of landscape photos
            log.warning(
                "%s has no labelled pixel there; the claim %s is left out",
                causal.path,
                name,
            )
            continue
        numbers[name, "causal"] = Number(difference, difference)
    return numbers
