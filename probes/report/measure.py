"""Measure each claim: the differences of effects that the runs of a study and their analyses wrote.

Effects are vectors of a number and its resamplings (probes/analyses/claims.py). All use the same resamplings of the
study's validation images, so differences between sites, masks and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (probes/score/effects.py). The paper
chooses it on the images that it is scored on, which favours models with many layers; tables keep that definition.

A solved run has each effect of layers three times, "EFFECT@ROW": with the probes of the strengths of regularisation
that cross-validation chose, and with those that all sites have one step stronger and one step weaker.

What has no verdict has a reason, and what to run the study again with.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from probes.analyses import ANALYSES
from probes.analyses.analysis import Claim
from probes.analyses.claims import ANALYSIS_OF, CLAIMS, read_effects
from probes.models.sites import ADAPTER, ENCODER
from probes.runs.compare import check_pair, knockout_difference
from probes.runs.read import ProbeRun
from probes.runs.study import CONTROLS, MASKS, UNTRAINED, StudyRuns, by_mask
from probes.score.estimate import Estimate
from probes.score.strengths import ROWS
from probes.steps.record import Outcome, unfinished_steps

from .verdicts import compare_to_draws

KNOCKOUT = "knockout"  # the analysis
GAIN = "recovery_trained"  # the recovery minus that of the untrained model


# by effect, mask, weights ("trained", "untrained" or a control), and whether probes are solved; several of draws
Effects = dict[tuple[str, str, str, bool], list[Estimate]]


def effects_of_study(study: StudyRuns) -> Effects:
    """Return what claims are judged from, of solved probes, and of trained ones if the main runs have these.

    An effect has the name of its claim, with "@ROW" at a row of strengths, with "@random" against random tokens.
    """
    of_run = {run.path: read_effects(run) for run in study.members}
    effects: Effects = {}
    for solved in {True, study.is_solved}:
        trained = by_mask(study.where(arm="trained", solved=solved))
        untrained = by_mask(study.where(arm=UNTRAINED, solved=solved))
        # where masks are compared: the best layer of the trained model, for its controls too
        site = next((run.peak_layer for run in trained.values()), None)
        models = [("trained", trained)]
        models += [("untrained", {mask: untrained[mask] for mask in untrained if mask in trained})]
        for control in (*CONTROLS["llm"], *CONTROLS["adapter"]):
            models += [(control, draw) for draw in study.draws(control, solved=solved)]
        for weights, runs in models:
            own = {mask: of_run[run.path] for mask, run in runs.items()}
            if all(mask in runs and site in runs[mask].sites for mask in MASKS):
                check_pair(*(runs[mask] for mask in MASKS))
                gaps = between_masks(own["causal"], own["bidirectional"], site)
                own["causal"] = own["causal"] | gaps
            for mask, of_mask in own.items():
                for name, estimate in of_mask.items():
                    claim = CLAIMS.get(name.partition("@")[0])
                    if claim is None or not is_defined(estimate):
                        continue
                    if weights != "trained" or claim.applies is None or claim.applies(runs):
                        effects.setdefault((name, mask, weights, solved), []).append(estimate)
        rows = ("", *(f"@{row}" for row in ROWS))
        for mask, row in product(trained, rows):
            own, before = (
                effects.get((f"recovery{row}", mask, weights, solved))
                for weights in ("trained", "untrained")
            )
            if own and before:
                gain = own[0] - before[0]
                if row:
                    converged = [x[0].about["converged"] for x in (own, before)]
                    gain = replace(gain, about={"converged": all(converged)})
                effects[f"{GAIN}{row}", mask, "trained", solved] = [gain]
    return effects


def is_defined(estimate: Estimate) -> bool:
    """Return whether an effect and its interval are numbers; in the padding of landscape photos none is measured."""
    return all(map(math.isfinite, (estimate.value, *estimate.ci95)))


def between_masks(
    causal: Mapping[str, Estimate], bidirectional: Mapping[str, Estimate], site: str
) -> dict[str, Estimate]:
    """Return the claims that are differences of the effects of two masks at a site."""
    gaps = {}
    for name, claim in CLAIMS.items():
        effect = f"{claim.between_masks}@{site}"
        if effect in causal and effect in bidirectional:
            gaps[name] = bidirectional[effect] - causal[effect]
    return gaps


@dataclass(frozen=True)
class Case:
    """A claim under a mask, and all that it is judged from.

    Args:
        study: The runs.
        name: Name of the claim.
        mask: The mask.
        effects: Of the study, from :func:`effects_of_study`.
    """

    study: StudyRuns
    name: str
    mask: str
    effects: Effects

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
    def judged(self) -> str:
        """The effect that it is at the optimum and beyond random; a knockout without a contrast has none."""
        return f"{self.name}@random" if self.claim.against_tokens else self.name

    def number(self, effect: str, solved: bool, weights: str = "trained") -> Estimate | None:
        """Return an effect of a model from probes of one kind, None without."""
        return next(iter(self.effects.get((effect, self.mask, weights, solved), ())), None)

    def minus_draws(self, solved: bool) -> dict[tuple[str, str], Estimate]:
        """Return the claim's number minus that of random draws, two at least, by mask and control."""
        found = {}
        masks = dict.fromkeys(run.mask for run in self.study.members)
        for mask, control in product(masks, self.controls):
            case = replace(self, mask=mask)
            trained = case.number(self.judged, solved)
            draws, judged = (
                self.effects.get((effect, mask, control, solved), ())
                for effect in (self.name, self.judged)
            )
            # a draw whose knockout has no contrast leaves the claim without this control
            is_known = trained and len(draws) == len(judged) > 1
            if is_known and not case.other_knockouts(control, solved):
                found[mask, control] = compare_to_draws(trained, judged)
        return found

    def other_knockouts(self, control: str, solved: bool) -> str:
        """Return why knockouts of a control are not comparable with the trained one's, "" if they are."""
        trained = self.study.where(arm="trained", mask=self.mask, solved=solved)
        if ANALYSIS_OF.get(self.name) != KNOCKOUT or not trained:
            return ""
        draws = [x[self.mask] for x in self.study.draws(control, solved=solved) if self.mask in x]
        return next(filter(None, (knockout_difference(trained[0], run) for run in draws)), "")


# ------------------------------------------------------------------------------------------------ what is missing
def again(reason: str, option: str) -> str:
    """Return a reason with what to do."""
    return f"{reason}: run the study again with {option}"


def why_no_optimum(case: Case, rows: Mapping[str, Estimate]) -> str:
    """Return why a claim is not judged at the optimum, "" if it is; `rows` are its effects at rows of strengths."""
    missing = [mask for mask in case.masks if mask not in case.study.solved]
    if missing:
        mask = f" under {missing[0]} attention" * case.study.first.has_llm
        return again(f"no solved probes{mask}", "trained among its --arms")
    if case.name == GAIN and not rows:
        return again("no solved run of the untrained model", "untrained0 among its --arms")
    runs = [case.study.solved[mask] for mask in case.masks]
    if case.name == GAIN:
        runs += case.study.where(arm=UNTRAINED, mask=case.mask, solved=True)[:1]
    if not case.number(case.judged, solved=True):
        return why_no_number(case, runs, "the solved probes")
    if "chosen" in rows and rows["chosen"].about["converged"]:
        return ""
    return why_unconverged(case, runs)


def why_no_draws(case: Case, control: str) -> str:
    """Return why a claim was not compared with a control."""
    study = case.study
    kind = "draws of " + ("random adapters" if control == "adapter" else f"{control} layers")
    # trained probes are compared with trained ones only
    count = max(len(study.draws(control, solved=solved)) for solved in {True, study.is_solved})
    if count < 2:
        left_out = [x for folder in study.first.path.parents[:2] for x in unfinished_steps(folder)]
        for step in left_out:
            if step["outcome"] == Outcome.LEFT_OUT and Path(step["step"]).name == f"{control}0":
                return f"{kind}: {count}, two are needed: {step['reason']}"
        option = f"--draws 2, or {control}0 and {control}1 among its --arms"
        return again(f"{kind}: {count}, two are needed", option)
    if not case.number(case.judged, study.is_solved):
        return why_no_number(case, [study.main_runs[case.mask]], "the model")
    if reason := case.other_knockouts(control, study.is_solved):
        return reason
    draws = [x[case.mask] for x in study.draws(control, solved=study.is_solved) if case.mask in x]
    if not (case.name in ANALYSIS_OF and draws) or case.claim.between_masks:
        return again(f"fewer than two {kind} under the same mask", "--draws 2")
    return why_no_number(case, draws, kind)


def why_undecided(case: Case, compared: Container[str], solved: bool) -> str:
    """Return why a number beyond random has no verdict: a control is missing, or draws have not converged; else ""."""
    for control in case.controls:
        if control not in compared:
            return why_no_draws(case, control)
    draws = [draw for control in case.controls for draw in case.study.draws(control, solved=True)]
    runs = [draw[mask] for draw in draws for mask in case.masks if mask in draw]
    return why_unconverged(case, runs) if solved else ""


def why_no_number(case: Case, runs: list[ProbeRun], kind: str) -> str:
    """Return why runs have no number: they lack the analysis, or their knockouts have no contrast."""
    name = ANALYSIS_OF.get(case.name, case.name)
    if not (case.claim.against_tokens and all(run.analysis("knockout.json") for run in runs)):
        reason = f"no {name} of {kind}"
        return again(reason, f"--add {name}") if name in ANALYSES else reason
    reason = f"the knockout of {runs[0].path} has no two classes that are mistaken for each other, in enough images"
    return again(reason, "both classes of a pair in --add knockout.classes=A,B")


def why_unconverged(case: Case, runs: list[ProbeRun]) -> str:
    """Return why the solved probes that a claim reads do not count, "" if those of all runs have converged."""
    for run in runs if case.claim.reads_probes else ():
        names = (ENCODER, ADAPTER) if case.name == "adapter_drop" else run.layers
        sites = [i for i, site in enumerate(run.sites) if site in names]
        unconverged = run.strengths.unconverged(run.strengths.neighbours()["chosen"], sites)
        if unconverged:
            reason = f"probes of {run.path} have not converged at the chosen strength at {', '.join(unconverged)}"
            return again(reason, "stronger --strengths")
    return ""
