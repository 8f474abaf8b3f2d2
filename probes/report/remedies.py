"""Why a column of a claim has no verdict, and the command that gives it one.

`NEEDS` lists what each column needs, in the order in which it is made; `NEEDS_OF_DRAWS` what a comparison with one kind
of random weights needs. Each need is a function of the case that returns "" if it is met, else the reason with the
remedy. The reason of a column is that of its first need that is not met.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Any

from probes.analyses import ANALYSES
from probes.analyses.claims import ANALYSIS_OF, CLAIMS
from probes.analyses.knockout.contrasts import MIN_IMAGES
from probes.evaluation.strengths import CONVERGED, GRADIENT
from probes.models.sites import ADAPTER, ENCODER
from probes.results.finished_run import FinishedRun
from probes.results.formatting import Entry, Rows
from probes.results.run_command import format_command
from probes.results.steps import LEFT_OUT, study_folder, unfinished_steps
from probes.results.study import MASKS, UNTRAINED, StudyRuns
from probes.tasks import SEGMENTATION

from .measure import KNOCKOUT, Measured, Number, other_knockouts, random_part

STRONGER = (100, 30, 10)  # times the strength at which probes have not converged
MATCHES = {"random": "update", "permuted": "permuted"}  # `model.match` of a control


@dataclass(frozen=True)
class Case:
    """A claim under a mask, and all that it is judged from.

    Args:
        study: The runs.
        claim: Name of the claim.
        mask: The mask.
        measured: Numbers of the study, from :func:`measure_study`.
        path: Its rows along the path of strengths, from :func:`path_rows`; [] for claims without.
    """

    study: StudyRuns
    claim: str
    mask: str
    measured: Mapping[bool, Measured]
    path: Rows

    @property
    def sign(self) -> int:
        """The claimed sign."""
        return CLAIMS[self.claim].sign

    @property
    def masks(self) -> list[str]:
        """The masks whose runs the claim compares."""
        return list(MASKS) if CLAIMS[self.claim].between_masks else [self.mask]

    @property
    def main(self) -> Number:
        """The number of the main runs."""
        return self.measured[self.study.is_solved].trained[self.claim, self.mask]

    @property
    def solved(self) -> Number | None:
        """The number from solved probes, None without."""
        return self.measured[True].trained.get((self.claim, self.mask))

    def draws(self, control: str, solved: bool) -> list[FinishedRun]:
        """Return the draws of a control under the mask."""
        draws = self.study.draws(control, solved=solved)
        return [draw[self.mask] for draw in draws if self.mask in draw]

    def command(
        self,
        command: str,
        mask: str | None = None,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Return the command that makes probes which the study lacks, with the settings of a run that it has."""
        study = self.study
        mask = mask or self.mask
        kinds = [study.main_runs, study.solved]
        if command == "solve":  # with the options of the solver
            kinds.reverse()
        run = next((runs[mask] for runs in kinds if mask in runs), study.first)
        if run.has_llm:
            changes = {"model.image_attention": mask, **changes}
        return f"`{format_command(run, command, changes)}`"


# ------------------------------------------------------------------------------------------------ of columns
def trained_probes(case: Case) -> str:
    """Require trained probes, as the paper has them."""
    if not CLAIMS[case.claim].reads_probes or not case.study.is_solved:
        return ""
    remedy = f"run {case.command('fit')}, the paper's recipe"
    if study_folder(case.study.first.path) and case.study.task.name == SEGMENTATION:
        remedy = "give the same `probes study` again with `--fit`, the paper's recipe"
    return f"the number is that of solved probes: {remedy}"


def solved_probes(case: Case) -> str:
    """Require solved probes under each mask that is compared."""
    missing = [mask for mask in case.masks if mask not in case.study.solved]
    return f"no solved probes: run {case.command('solve', missing[0])}" if missing else ""


def solved_untrained(case: Case) -> str:
    """Require a solved run of the untrained model for what comes from training."""
    if case.claim != "recovery_trained" or case.path:
        return ""
    command = case.command("solve", changes={"model.untrained": ["adapter", "llm"]})
    return f"no solved run of the untrained model: run {command}"


def analysis(case: Case) -> str:
    """Require the analysis that the claim is about."""
    return "" if case.solved else no_analysis(case.claim, case.study.solved[case.mask])


def contrast(case: Case) -> str:
    """Require a contrast between classes of a knockout."""
    return "" if case.solved.judged else no_contrast(case.study.solved[case.mask])


def convergence(case: Case) -> str:
    """Require that the solved probes which the claim reads have converged."""
    if not CLAIMS[case.claim].reads_probes:
        return ""
    if any(row["row"] == "chosen" and row["converged"] for row in case.path):
        return ""
    runs = [case.study.solved[mask] for mask in case.masks]
    if case.claim == "recovery_trained":
        runs += case.study.where(
            arm=UNTRAINED,
            mask=case.mask,
            solved=True,
        )[:1]
    return why_unconverged(runs, case.claim)


NEEDS = {
    "paper": (trained_probes,),
    "optimum": (solved_probes, solved_untrained, analysis, contrast, convergence),
}


def why_untested(column: str, case: Case) -> str:
    """Return why a column has no verdict, and what to do; "" if it has one."""
    return next(filter(None, (need(case) for need in NEEDS[column])), "")


# ------------------------------------------------------------------------------------------------ of draws
def two_draws(case: Case, control: str) -> str:
    """Require two draws, without which there is no interval."""
    study = case.study
    kinds = {True, study.is_solved}  # trained probes are compared with trained ones only
    count = max(len(study.draws(control, solved=solved)) for solved in kinds)
    if count >= 2:
        return ""
    too_few = f"draws of a {_name(case, control)}: {count}, two are needed"
    folder = study_folder(study.first.path)
    for step in unfinished_steps(folder) if folder else ():
        if step["outcome"] == LEFT_OUT and Path(step["step"]).name == f"{control}0":
            return f"{too_few}: {step['reason']}"
    if folder:
        again = f"{too_few}: give the same `probes study` again with `--draws 2`"
        return f"{again}, or with {control}0 and {control}1 among its `--arms`"
    weights: dict[str, Any] = {"model.untrained": [_random_part(case)]}
    if control in MATCHES:
        weights["model.match"] = MATCHES[control]
    command = case.command("solve", changes=weights | {"model.draw": count})
    again = ", and the same with --model.draw 1" if count == 0 else ""
    return f"{too_few}: run {command}{again}"


def contrast_of_trained(case: Case, control: str) -> str:
    """Require a contrast of the trained model's knockout."""
    if case.main.judged:
        return ""
    return no_contrast(case.study.main_runs[case.mask])


def same_knockouts(case: Case, control: str) -> str:
    """Require knockouts with the options of the trained model's."""
    study = case.study
    return other_knockouts(study, case.claim, case.mask, control, study.is_solved) or ""


def analysis_of_draws(case: Case, control: str) -> str:
    """Require the analysis of the claim, of a knockout with a contrast."""
    name = ANALYSIS_OF.get(case.claim)
    if name is None or CLAIMS[case.claim].between_masks:
        return ""
    draws = case.draws(control, case.study.is_solved)
    if CLAIMS[case.claim].against_tokens and draws:
        if all(run.analysis("knockout.json") for run in draws):
            return no_contrast(draws[0])
    command = f"`probes {name}`" if name in ANALYSES else name
    options = "--classes" if name == KNOCKOUT else "options"
    runs = f"the runs with a {_name(case, control)}"
    return f"draws without this analysis: run {command} on {runs}, with the same {options}"


def draws_under_the_mask(case: Case, control: str) -> str:
    """Require draws with the masks of the claim."""
    runs = f"the runs with a {_name(case, control)}"
    return f"fewer than two draws under the same mask: solve {runs} under each mask"


NEEDS_OF_DRAWS = (
    two_draws,
    contrast_of_trained,
    same_knockouts,
    analysis_of_draws,
    draws_under_the_mask,
)


def why_no_draws(case: Case, control: str) -> str:
    """Return why a claim was not compared with a control, and the command that changes it."""
    return next(filter(None, (need(case, control) for need in NEEDS_OF_DRAWS)))


# ------------------------------------------------------------------------------------------------ shared
def why_unconverged(runs: list[FinishedRun], claim: str) -> str:
    """Return why the solved probes that a claim reads do not count, "" if those of all runs have converged."""
    for run in runs:
        names = (ENCODER, ADAPTER) if claim == "adapter_drop" else run.layers
        sites = [i for i, site in enumerate(run.sites) if site in names]
        unconverged = run.strengths.unconverged(run.strengths.neighbours()["chosen"], sites)
        if unconverged:
            return (
                f"probes of {run.path} have not converged at the chosen strength at {len(unconverged)} of {len(sites)} "
                f"sites; {_farthest(unconverged)}: run {_solve_further(run, unconverged)}, and give RUN in place of "
                f"{run.path}"
            )
    return ""


def _farthest(unconverged: Mapping[str, Entry | None]) -> str:
    """Return the site whose certificate is the farthest from holding, and its numbers."""

    def distance(site: str) -> float:
        certificate = unconverged[site]
        if certificate is None:
            return math.inf
        return max(certificate["gradient"] / GRADIENT, certificate["decrease"] / CONVERGED)

    site = max(unconverged, key=distance)
    certificate = unconverged[site]
    if certificate is None:
        return f"{site} has no certificate"
    return (
        f"farthest is {site}, with a gradient of {certificate['gradient']:.2g} of that at w = 0 and an expected "
        f"decrease of {certificate['decrease']:.2g} nats (a certificate needs less than {GRADIENT:g} and {CONVERGED:g})"
    )


def _solve_further(run: FinishedRun, unconverged: Collection[str]) -> str:
    """Return the command that solves the probes of a run with more passes, or at strengths where they converge sooner.

    In memory a probe stops where float32 no longer resolves its loss, which stronger regularisation makes better posed.
    """
    passes = run.metrics["path"]["passes"]
    if passes > 1:
        changes = {"passes": 2 * max(passes, run.manifest["config"].get("passes") or 0)}
    else:
        chosen = [site["chosen"] for site in run.site_strengths if site["site"] in unconverged]
        changes = {"strengths": [float(f"{factor * max(chosen):.2g}") for factor in STRONGER]}
    return f"`{format_command(run, 'solve', changes)}`"


def no_analysis(claim: str, run: FinishedRun) -> str:
    """Return that the solved probes of a run lack the analysis of a claim, and what to do."""
    name = ANALYSIS_OF[claim]
    missing = f"no {name} of the solved probes: run"
    if name not in ANALYSES:
        return f"{missing} it on {run.path}"
    options = " --classes auto:4" if name == KNOCKOUT else ""
    return f"{missing} `probes {name} --probes {quote(str(run.path))}{options}`"


def no_contrast(run: FinishedRun) -> str:
    """Return that a knockout has no contrast, and what to do."""
    if run.metrics["images"] < MIN_IMAGES:
        return (
            f"{run.path} has {run.metrics['images']} validation images, and a knockout is judged from cases in "
            f"{MIN_IMAGES} or more"
        )
    return (
        f"the knockout of {run.path} has no two classes that are mistaken for each other, in enough images: run "
        f"`probes knockout --probes {quote(str(run.path))} --classes` with both classes of a pair"
    )


def _random_part(case: Case) -> str:
    return random_part(case.claim) if case.study.first.has_llm else "encoder"


def _name(case: Case, control: str) -> str:
    """Return what is random: "random llm", "permuted encoder"."""
    return f"{'permuted' if control == 'permuted' else 'random'} {_random_part(case)}"
