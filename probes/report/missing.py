"""Why a column of a claim has no verdict, and what to run the study again with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from probes.analyses import ANALYSES
from probes.analyses.claims import ANALYSIS_OF, CLAIMS
from probes.analyses.knockout.effects import MIN_IMAGES
from probes.models.sites import ADAPTER, ENCODER
from probes.runs.finished_run import FinishedRun
from probes.runs.formatting import Rows
from probes.runs.steps import LEFT_OUT, study_folder, unfinished_steps
from probes.runs.study import MASKS, UNTRAINED, StudyRuns
from probes.tasks import SEGMENTATION

from .measure import Measured, Number, other_knockouts, random_part


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


def again(reason: str, option: str) -> str:
    """Return a reason with what to do."""
    return f"{reason}: run the study again with {option}"


def why_no_paper(case: Case) -> str:
    """Return why the number is not one as the paper measures it, "" if it is."""
    if not CLAIMS[case.claim].reads_probes or not case.study.is_solved:
        return ""
    reason = "the number is that of solved probes"
    return again(reason, "--fit") if case.study.task.name == SEGMENTATION else reason


def why_no_optimum(case: Case) -> str:
    """Return why a claim is not judged at the optimum, "" if it is."""
    missing = [mask for mask in case.masks if mask not in case.study.solved]
    if missing:
        mask = f" under {missing[0]} attention" * case.study.first.has_llm
        return again(f"no solved probes{mask}", "trained among its --arms")
    if case.claim == "recovery_trained" and not case.path:
        return again("no solved run of the untrained model", "untrained0 among its --arms")
    if not case.solved:
        return why_no_analysis("the solved probes", ANALYSIS_OF[case.claim])
    run = case.study.solved[case.mask]
    if not case.solved.judged:
        return why_no_contrast(run)
    if not CLAIMS[case.claim].reads_probes or any(
        row["row"] == "chosen" and row["converged"] for row in case.path
    ):
        return ""
    runs = [case.study.solved[mask] for mask in case.masks]
    if case.claim == "recovery_trained":
        runs += case.study.where(
            arm=UNTRAINED,
            mask=case.mask,
            solved=True,
        )[:1]
    return why_unconverged(runs, case.claim)


def why_no_draws(case: Case, control: str) -> str:
    """Return why a claim was not compared with a control."""
    study = case.study
    part = random_part(case.claim) if study.first.has_llm else "encoder"
    kinds = {True, study.is_solved}  # trained probes are compared with trained ones only
    count = max(len(study.draws(control, solved=solved)) for solved in kinds)
    kind = f"draws of a {'permuted' if control == 'permuted' else 'random'} {part}"
    if count < 2:
        reason = f"{kind}: {count}, two are needed"
        folder = study_folder(study.first.path)
        for step in unfinished_steps(folder) if folder else ():
            if step["outcome"] == LEFT_OUT and Path(step["step"]).name == f"{control}0":
                return f"{reason}: {step['reason']}"
        return again(reason, f"--draws 2, or {control}0 and {control}1 among its --arms")
    if not case.main.judged:
        return why_no_contrast(study.main_runs[case.mask])
    if reason := other_knockouts(
        study,
        case.claim,
        case.mask,
        control,
        study.is_solved,
    ):
        return reason
    draws = [
        draw[case.mask]
        for draw in study.draws(control, solved=study.is_solved)
        if case.mask in draw
    ]
    name = ANALYSIS_OF.get(case.claim)
    if not (name and draws) or CLAIMS[case.claim].between_masks:
        return again(f"fewer than two {kind} under the same mask", "--draws 2")
    if CLAIMS[case.claim].against_tokens and all(x.analysis("knockout.json") for x in draws):
        return why_no_contrast(draws[0])
    return why_no_analysis(kind, name)


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
