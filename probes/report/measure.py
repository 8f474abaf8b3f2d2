"""Measure each claim: the differences of effects that the runs of a study and their analyses wrote.

Effects are vectors of a number and its resamplings (probes/analyses/claims.py). All use the same resamplings of the
study's validation images, so differences between sites, masks and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (probes/score/effects.py). The paper
chooses it on the images that it is scored on, which favours models with many layers; tables keep that definition.

A solved run has each effect of layers three times, "EFFECT@ROW": with the probes of the strengths of regularisation
that cross-validation chose, and with those that all sites have one step stronger and one step weaker.

What has no verdict has a reason, and what to run the study again with.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from llava_bidir.common.bootstrap import simultaneous_band
from probes.analyses import ANALYSES
from probes.analyses.base import Claim
from probes.analyses.claims import ANALYSIS_OF, CLAIMS, read_effects
from probes.analyses.knockout.effects import MIN_IMAGES
from probes.models.sites import ADAPTER, ENCODER
from probes.runs.compare import check_pair, knockout_difference
from probes.runs.formatting import Rows
from probes.runs.read import FinishedRun
from probes.runs.steps import LEFT_OUT, study_folder, unfinished_steps
from probes.runs.study import CONTROLS, MASKS, UNTRAINED, StudyRuns, by_mask
from probes.score.estimate import Estimate
from probes.score.strengths import ROWS
from probes.tasks import SEGMENTATION

from .verdicts import compare_to_draws

log = logging.getLogger(__name__)

KNOCKOUT = "knockout"  # the analysis

Key = tuple[str, str]  # claim, mask


class Number(NamedTuple):
    """The number of a claim in a model."""

    paper: Estimate  # as the paper measures it
    # at the optimum and beyond random; None for a knockout without a contrast
    judged: Estimate | None


class Measured(NamedTuple):
    """The numbers of a study from probes of one kind: of the trained model, and of those with random weights."""

    trained: dict[Key, Number]
    untrained: dict[Key, Number]
    draws: dict[str, list[dict[Key, Number]]]  # by control


@dataclass(frozen=True)
class Case:
    """A claim under a mask, and all that it is judged from.

    Args:
        study: The runs.
        name: Name of the claim.
        mask: The mask.
        measured: Numbers of the study, from :func:`measure_study`.
    """

    study: StudyRuns
    name: str
    mask: str
    measured: Mapping[bool, Measured]

    @property
    def claim(self) -> Claim:
        """What is claimed."""
        return CLAIMS[self.name]

    @property
    def masks(self) -> list[str]:
        """The masks whose runs the claim compares."""
        return list(MASKS) if self.claim.between_masks else [self.mask]

    @property
    def controls(self) -> tuple[str, ...]:
        """The kinds of random weights beyond which it must hold."""
        return CONTROLS["adapter" if self.name == "adapter_drop" else "llm"]

    @property
    def main(self) -> Number:
        """The number of the main runs."""
        return self.measured[self.study.is_solved].trained[self.name, self.mask]

    @property
    def solved(self) -> Number | None:
        """The number from solved probes, None without."""
        return self.measured[True].trained.get((self.name, self.mask))

    def beyond_random(self, solved: bool) -> dict[tuple[str, str], Estimate]:
        """Return the claim's number minus that of random draws, two at least, by mask and control."""
        found = {}
        measured = self.measured.get(solved)
        for (name, mask), number in measured.trained.items() if measured else ():
            for control in self.controls if name == self.name and number.judged else ():
                draws = measured.draws[control]
                numbers = [draw[name, mask].judged for draw in draws if (name, mask) in draw]
                is_other = self.other_knockouts(
                    control,
                    solved,
                    mask,
                )
                if len(numbers) > 1 and all(numbers) and not is_other:
                    found[mask, control] = compare_to_draws(number.judged, numbers)
        return found

    def other_knockouts(
        self,
        control: str,
        solved: bool,
        mask: str,
    ) -> str | None:
        """Return why knockouts of a control are not comparable with the trained one's; None for other claims."""
        trained = self.study.where(
            arm="trained",
            mask=mask,
            solved=solved,
        )
        if ANALYSIS_OF.get(self.name) != KNOCKOUT or not trained:
            return None
        draws = self.study.draws(control, solved=solved)
        runs = [draw[mask] for draw in draws if mask in draw]
        return next(filter(None, (knockout_difference(trained[0], run) for run in runs)), None)

    def strengths(self) -> Rows:
        """Return the effect at each row of strengths, with an interval that holds at all; [] of other claims.

        A row counts, "converged", only if the certificates of all sites that the effect reads hold.
        """
        run = self.study.solved.get(self.mask)
        by_row = effect_by_row(run, self.name) if run else {}
        if run and self.name == "recovery_trained":
            control = self.study.where(
                arm=UNTRAINED,
                mask=self.mask,
                solved=True,
            )
            others = effect_by_row(control[0], "recovery") if control else {}
            for row, own in effect_by_row(run, "recovery").items():
                if other := others.get(row):
                    converged = own.about["converged"] and other.about["converged"]
                    by_row[row] = replace(own - other, about={"converged": converged})
        if not by_row:
            return []
        values = torch.tensor([x.value for x in by_row.values()], dtype=torch.float64)
        resampled = torch.stack([x.resampled for x in by_row.values()], 1)
        bounds = torch.stack(simultaneous_band(values, resampled), 1).tolist()
        return [
            {
                "row": row,
                "value": effect.value,
                "low": low,
                "high": high,
                "converged": effect.about["converged"],
            }
            for (row, effect), (low, high) in zip(
                by_row.items(),
                bounds,
                strict=True,
            )
        ]


def effect_by_row(run: FinishedRun, name: str) -> dict[str, Estimate]:
    """Return an effect of solved probes by row of strengths; {} if it has none."""
    found = {row: run.effects.get(f"{name}@{row}") for row in ROWS}
    return {row: effect for row, effect in found.items() if effect}


def measure_study(study: StudyRuns) -> dict[bool, Measured]:
    """Return the numbers from solved probes under True; under False from trained ones, if the main runs have these."""
    effects = {str(run.path): _effects_of(run) for run in study.members}
    return {
        solved: _measure_probes(
            study,
            solved,
            effects,
        )
        for solved in {True, study.is_solved}
    }


def _measure_probes(
    study: StudyRuns,
    solved: bool,
    effects: Mapping[str, Mapping[str, Estimate]],
) -> Measured:
    """Return the numbers from probes of one kind; effects are by the folder of a run."""
    runs = by_mask(study.where(arm="trained", solved=solved))
    # where masks are compared: the best layer of the trained model, for its controls too
    site = next((run.peak_layer for run in runs.values()), None)
    trained = {
        (name, mask): number
        for (name, mask), number in measure_runs(
            runs,
            effects,
            site,
        ).items()
        if CLAIMS[name].applies is None or CLAIMS[name].applies(runs)
    }
    before = by_mask(study.where(arm=UNTRAINED, solved=solved))
    before = {mask: run for mask, run in before.items() if mask in runs}
    untrained = measure_runs(
        before,
        effects,
        site,
    )
    for name, mask in list(trained):
        if name == "recovery" and (name, mask) in untrained:
            gain = trained[name, mask].judged - untrained[name, mask].judged
            trained["recovery_trained", mask] = Number(gain, gain)
    draws = {
        control: [
            measure_runs(
                draw,
                effects,
                site,
            )
            for draw in study.draws(control, solved=solved)
        ]
        for controls in CONTROLS.values()
        for control in controls
    }
    return Measured(
        trained,
        untrained,
        draws,
    )


def measure_runs(
    runs: Mapping[str, FinishedRun],
    effects: Mapping[str, Mapping[str, Estimate]],
    site: str | None,
) -> dict[Key, Number]:
    """Return the number of each claim from runs of one kind, by mask; `site` is where masks are compared."""
    numbers: dict[Key, Number] = {}
    for mask, run in runs.items():
        of_run = effects[str(run.path)]
        for name in CLAIMS.keys() & of_run.keys():
            judged = f"{name}@random" if CLAIMS[name].against_tokens else name
            numbers[name, mask] = Number(of_run[name], of_run.get(judged))
    pair = [runs[mask] for mask in MASKS if mask in runs]
    if len(pair) < 2 or any(site not in run.sites for run in pair):
        return numbers
    check_pair(*pair)
    causal, bidirectional = (effects[str(run.path)] for run in pair)
    for name, claim in CLAIMS.items():
        effect = f"{claim.between_masks}@{site}"
        if effect not in causal or effect not in bidirectional:
            continue
        gap = bidirectional[effect] - causal[effect]
        if math.isnan(gap.value):  # e.g. the padding of landscape photos
            text = "%s has no labelled pixel there; the claim %s is left out"
            log.warning(
                text,
                pair[0].path,
                name,
            )
            continue
        numbers[name, "causal"] = Number(gap, gap)
    return numbers


def _effects_of(run: FinishedRun) -> dict[str, Estimate]:
    """Return the effects of a run, which say what they are means over: of a run's own scores, the images."""
    count = {"images": run.metrics["images"]}
    if run.groups is not None:
        count["groups"] = len(run.groups.unique())
    return {
        name: replace(effect, about={"n": count} | dict(effect.about))
        for name, effect in read_effects(run).items()
    }


# ------------------------------------------------------------------------------------------------ what is missing
def again(reason: str, option: str) -> str:
    """Return a reason with what to do."""
    return f"{reason}: run the study again with {option}"


def why_no_paper(case: Case) -> str:
    """Return why the number is not one as the paper measures it, "" if it is."""
    if not case.claim.reads_probes or not case.study.is_solved:
        return ""
    reason = "the number is that of solved probes"
    return again(reason, "--fit") if case.study.task.name == SEGMENTATION else reason


def why_no_optimum(case: Case, rows: Rows) -> str:
    """Return why a claim is not judged at the optimum, "" if it is."""
    missing = [mask for mask in case.masks if mask not in case.study.solved]
    if missing:
        mask = f" under {missing[0]} attention" * case.study.first.has_llm
        return again(f"no solved probes{mask}", "trained among its --arms")
    if case.name == "recovery_trained" and not rows:
        return again("no solved run of the untrained model", "untrained0 among its --arms")
    if not case.solved:
        return why_no_analysis("the solved probes", ANALYSIS_OF[case.name])
    run = case.study.solved[case.mask]
    if not case.solved.judged:
        return why_no_contrast(run)
    if not case.claim.reads_probes or any(
        row["row"] == "chosen" and row["converged"] for row in rows
    ):
        return ""
    runs = [case.study.solved[mask] for mask in case.masks]
    if case.name == "recovery_trained":
        runs += case.study.where(
            arm=UNTRAINED,
            mask=case.mask,
            solved=True,
        )[:1]
    return why_unconverged(runs, case.name)


def why_no_draws(case: Case, control: str) -> str:
    """Return why a claim was not compared with a control."""
    study = case.study
    part = "adapter" if control == "adapter" else "llm"
    part = part if study.first.has_llm else "encoder"
    kind = f"draws of a {'permuted' if control == 'permuted' else 'random'} {part}"
    # trained probes are compared with trained ones only
    count = max(len(study.draws(control, solved=solved)) for solved in {True, study.is_solved})
    if count < 2:
        reason = f"{kind}: {count}, two are needed"
        folder = study_folder(study.first.path)
        for step in unfinished_steps(folder) if folder else ():
            if step["outcome"] == LEFT_OUT and Path(step["step"]).name == f"{control}0":
                return f"{reason}: {step['reason']}"
        return again(reason, f"--draws 2, or {control}0 and {control}1 among its --arms")
    if not case.main.judged:
        return why_no_contrast(study.main_runs[case.mask])
    if reason := case.other_knockouts(
        control,
        study.is_solved,
        case.mask,
    ):
        return reason
    draws = [x.get(case.mask) for x in study.draws(control, solved=study.is_solved)]
    name = ANALYSIS_OF.get(case.name)
    if not (name and any(draws)) or case.claim.between_masks:
        return again(f"fewer than two {kind} under the same mask", "--draws 2")
    if case.claim.against_tokens and all(x.analysis("knockout.json") for x in draws if x):
        return why_no_contrast(next(filter(None, draws)))
    return why_no_analysis(kind, name)


def why_undecided(case: Case, compared: Iterable[tuple[str, str]], solved: bool) -> str:
    """Return why a number beyond random has no verdict: a control is missing, or draws have not converged; else ""."""
    for control in case.controls:
        if (case.mask, control) not in compared:
            return why_no_draws(case, control)
    if not solved or not case.claim.reads_probes:
        return ""
    draws = [draw for control in case.controls for draw in case.study.draws(control, solved=True)]
    runs = [draw[mask] for draw in draws for mask in case.masks if mask in draw]
    return why_unconverged(runs, case.name)


def why_no_analysis(runs: str, name: str) -> str:
    """Return that runs lack an analysis."""
    reason = f"no {name} of {runs}"
    return again(reason, f"--add {name}") if name in ANALYSES else reason


def why_unconverged(runs: list[FinishedRun], claim: str) -> str:
    """Return why the solved probes that a claim reads do not count, "" if those of all runs have converged."""
    for run in runs:
        names = (ENCODER, ADAPTER) if claim == "adapter_drop" else run.layers
        sites = [i for i, site in enumerate(run.sites) if site in names]
        unconverged = run.strengths.unconverged(run.strengths.neighbours()["chosen"], sites)
        if unconverged:
            reason = f"probes of {run.path} have not converged at the chosen strength at {', '.join(unconverged)}"
            return again(reason, "stronger --strengths")
    return ""


def why_no_contrast(run: FinishedRun) -> str:
    """Return why a knockout has no contrast."""
    if run.metrics["images"] < MIN_IMAGES:
        return f"{run.path} has {run.metrics['images']} validation images, fewer than {MIN_IMAGES}"
    reason = f"the knockout of {run.path} has no two classes that are mistaken for each other, in enough images"
    return again(reason, "both classes of a pair in --add knockout.classes=A,B")
