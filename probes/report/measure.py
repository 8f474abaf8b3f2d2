"""Measure each claim: from the effects that the runs of a study and their analyses wrote to the numbers of its columns.

Effects are vectors of a number and its resamplings (probes/analyses/claims.py). All use the same resamplings of the
study's validation images, so differences between sites, masks and controls are paired.

The best layer of a recovery is chosen by cross-validation over images (probes/score/effects.py). The paper
chooses it on the images that it is scored on, which favours models with many layers; tables keep that definition.

A solved run has each effect of layers three times: with the probes of the strengths of regularisation that
cross-validation chose, and with those that all sites have one step stronger and one step weaker.

What has no verdict has a reason, and what to run the study again with.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

from probes.analyses import ANALYSES
from probes.analyses.analysis import Claim
from probes.analyses.claims import ANALYSIS_OF, CLAIMS, WITHOUT_CONTEXT, read_effects
from probes.heads import LINEAR
from probes.models.sites import ADAPTER, ENCODER
from probes.runs.compare import check_pair, knockout_difference
from probes.runs.read import ProbeRun
from probes.runs.study import CONTROLS, UNTRAINED_ARMS, StudyRuns, by_mask
from probes.runs.write import summary
from probes.score.estimate import Estimate
from probes.score.strengths import ROWS
from probes.steps.record import Outcome, unfinished_steps

from .verdicts import compare_to_draws

KNOCKOUT = "knockout"  # the analysis
GAIN = "recovery_trained"  # the recovery minus that of the untrained model
COMPARED = (
    "compared"  # weights of the trained model, where its best layer is one that random models have
)
BESIDE_RANDOM = (COMPARED, *CONTROLS["llm"])
AGAINST_RANDOM = "random"  # after "@" in the name of an effect


class EffectKey(NamedTuple):
    """Which effect an estimate is of.

    Args:
        effect: Name of the effect, which is that of its claim.
        mask: Attention among image tokens; of a difference of masks, that which is compared with the first.
        weights: "trained", "untrained", the control whose draws are listed, or COMPARED.
        solved: Whether its probes are at the optimum.
        strength: Row of regularisation strengths; None for the probes of the run.
        site: The site that it is measured at; None for those that the effect names.
        against_random: Whether it is the contrast with random tokens.
    """

    effect: str
    mask: str
    weights: str
    solved: bool
    strength: str | None = None
    site: str | None = None
    against_random: bool = False


def read_key(name: str, *, mask: str, weights: str, solved: bool) -> EffectKey:
    """Return the key of an effect from its name in a file: "EFFECT", "EFFECT@ROW", "EFFECT@random" or "EFFECT@SITE"."""
    effect, _, detail = name.partition("@")
    key = EffectKey(effect=effect, mask=mask, weights=weights, solved=solved)
    if detail in ROWS:
        return key._replace(strength=detail)
    if detail == AGAINST_RANDOM:
        return key._replace(against_random=True)
    return key._replace(site=detail or None)


Effects = dict[EffectKey, list[Estimate]]  # one estimate, or one for each draw of a control


def effects_of_study(study: StudyRuns) -> Effects:
    """Return what claims are judged from, of solved probes, and of trained ones if the main runs have these."""
    named_effects = {run.path: read_effects(run) for run in study.members}
    effects: Effects = {}
    first = study.first.mask
    for solved in {True, study.is_solved}:
        trained = by_mask(study.where(arm="trained", solved=solved))
        for weights, runs in models_of_study(study, trained, solved=solved):
            layers = layers_of_weights(study, weights, trained)
            # where masks are compared: the best layer of the trained model, for its controls too
            compared_site = None
            if first in trained:
                compared_site = best_layer(trained[first], layers)
            estimates: dict[EffectKey, Estimate] = {}
            for mask, run in runs.items():
                effects_of_run = named_effects[run.path]
                if layers and run.layers != layers and weights in BESIDE_RANDOM:
                    effects_of_run = effects_among(run, effects_of_run, layers)
                for name, estimate in effects_of_run.items():
                    key = read_key(name, mask=mask, weights=weights, solved=solved)
                    estimates[key] = estimate
            compared = {mask: run for mask, run in runs.items() if compared_site in run.sites}
            if first in compared:
                for run in compared.values():
                    check_pair(compared[first], run)
                estimates |= differences_of_masks(estimates, first, compared_site)
            for key, estimate in estimates.items():
                pair = {mask: run for mask, run in runs.items() if mask in (first, key.mask)}
                if is_of_claim(key, pair) and is_defined(estimate):
                    effects.setdefault(key, []).append(estimate)
        effects |= gains_over_untrained(effects, masks=trained, solved=solved)
    if study.with_context:
        name = WITHOUT_CONTEXT[study.first.cut]
        effects |= without_context(name, effects, effects_of_study(study.with_context))
    return effects


def models_of_study(
    study: StudyRuns, trained: Mapping[str, ProbeRun], *, solved: bool
) -> Iterator[tuple[str, dict[str, ProbeRun]]]:
    """Yield the weights and the runs by mask of the trained model, the untrained one, and each draw of each control."""
    yield "trained", dict(trained)
    yield COMPARED, dict(trained)
    untrained = by_mask(study.where(arm=UNTRAINED_ARMS, solved=solved))
    of_same_masks = {mask: run for mask, run in untrained.items() if mask in trained}
    yield "untrained", of_same_masks
    for control in (*CONTROLS["llm"], *CONTROLS["adapter"]):
        for draw in study.draws(control, solved=solved):
            yield control, draw


def layers_of_weights(study: StudyRuns, weights: str, trained: Mapping[str, ProbeRun]) -> list[str]:
    """Return the layers that the best one is chosen of: all, or those that the trained model and random ones have."""
    for run in trained.values():
        if weights in BESIDE_RANDOM:
            return study.compared_layers(run)
        return run.layers
    return []


def best_layer(run: ProbeRun, layers: Container[str]) -> str | None:
    """Return the best decoder layer of a run among these, None without one."""
    entries = [entry for entry in run.metrics["sites"] if entry["site"] in layers]
    scores = {entry["site"]: entry[run.task.score] for entry in entries}
    return summary(scores, run.task.sign)["peak_site"]


def effects_among(
    run: ProbeRun, effects: Mapping[str, Estimate], layers: Sequence[str]
) -> dict[str, Estimate]:
    """Return effects of a run with the best of these layers only, without those of analyses that read all layers."""
    kept = {}
    for name, estimate in effects.items():
        effect, _, detail = name.partition("@")
        reads_layers = effect in ANALYSIS_OF and CLAIMS[effect].reads_probes
        if not reads_layers or detail in run.sites:
            kept[name] = estimate
    return kept | run.effects_among(layers)


def differences_of_masks(
    estimates: Mapping[EffectKey, Estimate], first: str, site: str
) -> dict[EffectKey, Estimate]:
    """Return the claims that are differences of the effects of another mask and the first one at a site."""
    differences = {}
    for key, estimate in estimates.items():
        of_first = estimates.get(key._replace(mask=first))
        if key.mask == first or key.site != site or not of_first:
            continue
        for name, claim in CLAIMS.items():
            if claim.between_masks == key.effect:
                differences[key._replace(effect=name, site=None)] = estimate - of_first
    return differences


def is_of_claim(key: EffectKey, runs: Mapping[str, ProbeRun]) -> bool:
    """Return whether a claim is judged from an effect; some are not made of all models, by their compared runs."""
    claim = CLAIMS.get(key.effect)
    if claim is None:
        return False
    is_trained = key.weights in ("trained", COMPARED)
    return not is_trained or claim.applies is None or claim.applies(runs)


def is_defined(estimate: Estimate) -> bool:
    """Return whether an effect and its interval are numbers; in the padding of landscape photos none is measured."""
    numbers = [estimate.value, *estimate.ci95]
    return all(map(math.isfinite, numbers))


def gains_over_untrained(effects: Effects, masks: Iterable[str], *, solved: bool) -> Effects:
    """Return the recovery of the trained model minus that of the untrained one, at each strength that both have."""
    gains: Effects = {}
    for mask, strength in product(masks, (None, *ROWS)):
        key = EffectKey(
            effect="recovery", mask=mask, weights="trained", solved=solved, strength=strength
        )
        of_trained = effects.get(key)
        of_untrained = effects.get(key._replace(weights="untrained"))
        if not (of_trained and of_untrained):
            continue
        gain = subtract(of_trained[0], of_untrained[0], at_strength=strength is not None)
        gains[key._replace(effect=GAIN)] = [gain]
    return gains


def without_context(name: str, cut: Effects, intact: Effects) -> Effects:
    """Return as effects `name` the recoveries under a cut of the encoder minus those without it, by model and draw."""
    differences: Effects = {}
    for key, of_cut in cut.items():
        if key.effect == "recovery" and key in intact:
            pairs = zip(of_cut, intact[key], strict=False)
            differences[key._replace(effect=name)] = [
                subtract(*pair, at_strength=bool(key.strength)) for pair in pairs
            ]
    return differences


def subtract(first: Estimate, second: Estimate, *, at_strength: bool) -> Estimate:
    """Return a difference, which has converged at a row of strengths if both have."""
    difference = first - second
    if not at_strength:
        return difference
    have_converged = [estimate.about["converged"] for estimate in (first, second)]
    return replace(difference, about={"converged": all(have_converged)})


@dataclass(frozen=True)
class Case:
    """A claim under a mask, and all that it is judged from.

    Args:
        study: The runs.
        name: Name of the claim.
        mask: The mask; of a claim between masks, that which is compared with the first.
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
    def masks(self) -> tuple[str, ...]:
        """The masks whose runs the claim compares, the first one first."""
        if self.claim.between_masks:
            return (self.study.first.mask, self.mask)
        return (self.mask,)

    @property
    def controls(self) -> tuple[str, ...]:
        """The kinds of random weights beyond which it must hold."""
        random_part = "adapter" if self.name == "adapter_drop" else "llm"
        return CONTROLS[random_part]

    @property
    def counts(self) -> tuple[float, float]:
        """Images, or groups of these, that it is a mean over, and those of a class on average."""
        first = self.study.first
        images = first.units
        if judged := self.judged_number(self.study.is_solved):
            counted = judged.about.get("n", {})
            images = min(images, counted.get("images", images))
        return images, min(images, first.units_of_class)

    def numbers(self, solved: bool, weights: str = "trained") -> list[Estimate]:
        """Return the claim's effect of models of some weights, from probes of one kind."""
        return self.effects.get(self._key(solved, weights), [])

    def judged_numbers(self, solved: bool, weights: str = "trained") -> list[Estimate]:
        """Return what it is at the optimum and beyond random; a knockout without a contrast has none."""
        key = self._key(solved, weights)
        judged_key = key._replace(against_random=self.claim.against_tokens)
        return self.effects.get(judged_key, [])

    def number(self, solved: bool, weights: str = "trained") -> Estimate | None:
        """Return the effect of a model, None without."""
        return next(iter(self.numbers(solved, weights)), None)

    def judged_number(self, solved: bool) -> Estimate | None:
        """Return what the trained model is judged by, None without."""
        return next(iter(self.judged_numbers(solved)), None)

    def numbers_by_strength(self) -> dict[str, Estimate]:
        """Return the effect of the trained model by row of regularisation strengths."""
        rows = {}
        for strength in ROWS:
            key = self._key(solved=True, weights="trained")._replace(strength=strength)
            for estimate in self.effects.get(key, []):
                rows[strength] = estimate
        return rows

    def _key(self, solved: bool, weights: str) -> EffectKey:
        return EffectKey(effect=self.name, mask=self.mask, weights=weights, solved=solved)

    def minus_draws(self, solved: bool) -> dict[tuple[str, str], Estimate]:
        """Return the claim's number minus that of random draws, two at least, by mask and control."""
        differences = {}
        masks = dict.fromkeys(run.mask for run in self.study.members)
        for mask, control in product(masks, self.controls):
            case = replace(self, mask=mask)
            trained = case.judged_numbers(solved, weights=COMPARED)
            draws = case.numbers(solved, weights=control)
            judged_draws = case.judged_numbers(solved, weights=control)
            # a draw whose knockout has no contrast leaves the claim without this control
            if not trained or len(draws) < 2:
                continue
            if len(draws) != len(judged_draws):
                continue
            if not case.other_knockouts(control, solved):
                differences[mask, control] = compare_to_draws(trained[0], judged_draws)
        return differences

    def other_knockouts(self, control: str, solved: bool) -> str:
        """Return why knockouts of a control are not comparable with the trained one's, "" if they are."""
        trained = self.study.where(arm="trained", mask=self.mask, solved=solved)
        if ANALYSIS_OF.get(self.name) != KNOCKOUT or not trained:
            return ""
        for run in self.runs_of_draws(control, solved):
            if difference := knockout_difference(trained[0], run):
                return difference
        return ""

    def runs_of_draws(self, control: str, solved: bool) -> list[ProbeRun]:
        """Return the runs of a control's draws under the mask."""
        draws = self.study.draws(control, solved=solved)
        return [draw[self.mask] for draw in draws if self.mask in draw]


# ------------------------------------------------------------------------------------------------ what is missing
def again(reason: str, option: str) -> str:
    """Return a reason with what to do."""
    return f"{reason}: run the study again with {option}"


def why_no_optimum(case: Case, rows: Mapping[str, Estimate]) -> str:
    """Return why a claim is not judged at the optimum, "" if it is; `rows` are its effects at rows of strengths."""
    if case.study.first.head != LINEAR:
        return "only linear probes are solved"
    missing = [mask for mask in case.masks if mask not in case.study.solved]
    if missing:
        mask = f" under {missing[0]} attention" * case.study.first.has_llm
        return again(f"no solved probes{mask}", option="trained among its --arms")
    if case.name == GAIN and not rows:
        reason = "no solved run of the untrained model"
        return again(reason, option="untrained0 among its --arms")
    runs = [case.study.solved[mask] for mask in case.masks]
    if case.name == GAIN:
        untrained = case.study.where(arm=UNTRAINED_ARMS, mask=case.mask, solved=True)
        runs += untrained[:1]
    if not case.judged_number(solved=True):
        return why_no_number(case, runs=runs, kind="the solved probes")
    if "chosen" in rows and rows["chosen"].about["converged"]:
        return ""
    return why_unconverged(case, runs)


def why_no_draws(case: Case, control: str) -> str:
    """Return why a claim was not compared with a control."""
    study = case.study
    kind = f"draws of {control} layers"
    if control == "adapter":
        kind = "draws of random adapters"
    # trained probes are compared with trained ones only
    kinds_of_probes = {True, study.is_solved}
    count = max(len(study.draws(control, solved=solved)) for solved in kinds_of_probes)
    if count < 2:
        return why_too_few_draws(case, control, reason=f"{kind}: {count}, two are needed")
    if not case.judged_number(study.is_solved):
        main_run = study.main_runs[case.mask]
        return why_no_number(case, runs=[main_run], kind="the model")
    if not case.judged_numbers(study.is_solved, weights=COMPARED):
        reason = f"{ANALYSIS_OF[case.name]} reads all layers, and random models have probes at some"
        return again(reason, option="--control_sites 1")
    if reason := case.other_knockouts(control, study.is_solved):
        return reason
    draws = case.runs_of_draws(control, study.is_solved)
    if not (case.name in ANALYSIS_OF and draws) or case.claim.between_masks:
        return again(f"fewer than two {kind} under the same mask", option="--draws 2")
    return why_no_number(case, runs=draws, kind=kind)


def why_too_few_draws(case: Case, control: str, reason: str) -> str:
    """Return a reason with that for which the study left the first draw out, else with the option that makes two."""
    for folder in case.study.first.path.parents[:2]:
        for step in unfinished_steps(folder):
            name = Path(step["step"]).name
            if step["outcome"] == Outcome.LEFT_OUT and name == f"{control}0":
                return f"{reason}: {step['reason']}"
    return again(reason, option=f"--draws 2 or {control}0 {control}1 among --arms")


def why_undecided(case: Case, compared: Container[str], solved: bool) -> str:
    """Return why a number beyond random has no verdict: a control is missing, or draws have not converged; else ""."""
    for control in case.controls:
        if control not in compared:
            return why_no_draws(case, control)
    if not solved:
        return ""
    runs = []
    for control in case.controls:
        for draw in case.study.draws(control, solved=True):
            runs += [draw[mask] for mask in case.masks if mask in draw]
    return why_unconverged(case, runs)


def why_no_number(case: Case, runs: list[ProbeRun], kind: str) -> str:
    """Return why runs have no number: they lack the analysis, or their knockouts have no contrast."""
    name = ANALYSIS_OF.get(case.name, case.name)
    knockouts = [run.analysis("knockout.json") for run in runs]
    if case.claim.against_tokens and all(knockouts):
        reason = f"the knockout of {runs[0].path} has no two classes that are mistaken for each other, in enough images"
        return again(reason, option="both classes of a pair in --add knockout.classes=A,B")
    reason = f"no {name} of {kind}"
    if name not in ANALYSES:
        return reason
    return again(reason, option=f"--add {name}")


def why_unconverged(case: Case, runs: list[ProbeRun]) -> str:
    """Return why the solved probes that a claim reads do not count, "" if those of all runs have converged."""
    if not case.claim.reads_probes:
        return ""
    for run in runs:
        names = run.layers
        if case.name == "adapter_drop":
            names = (ENCODER, ADAPTER)
        sites = [i for i, site in enumerate(run.sites) if site in names]
        chosen = run.strengths.neighbours()["chosen"]
        if unconverged := run.strengths.unconverged(chosen, sites):
            reason = f"probes of {run.path} have not converged at the chosen strength at {', '.join(unconverged)}"
            return again(reason, option="stronger --strengths")
    return ""
