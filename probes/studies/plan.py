"""The steps of a study, in order: each is a call with its options as values, and the folder or file that it writes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import describe_digest
from llava_bidir.common.imports import HINT
from probes.analyses import ANALYSES
from probes.analyses.effects import effects_path
from probes.data.registry import DATASETS, open_split
from probes.report.options import ReportOptions
from probes.report.truth import FILE as TRUTH_FILE
from probes.runs.runs import finished_runs
from probes.runs.steps import unfinished_steps
from probes.steps import Step, digest
from probes.tasks import SEGMENTATION, TASKS

from .analyses import check_classes, chosen_analyses, steps_of_models, steps_of_runs
from .arms import FITTED, Arm, join, plan_arms
from .config import StudyConfig


@dataclass(frozen=True)
class ReportStep(Step):
    """The report, which reads all finished runs of the study's folder, those of earlier calls, too."""

    def inputs(self) -> dict[str, str | None]:
        """Return the hashes of all results, and one of what has no result."""
        out = self.result.parents[1]
        names = ["metrics.json", *(analysis.result for analysis in ANALYSES.values())]
        runs = finished_runs(out)
        files = [run / name for run in runs for name in names]
        files += [file for run in runs for file in sorted(run.glob(effects_path(run, "*").name))]
        hashes = {str(file.relative_to(out)): digest(file) for file in files if file.is_file()}
        truth = self.reads.get(TRUTH_FILE)
        if truth and truth.is_file():
            hashes[TRUTH_FILE] = digest(truth)
        if unfinished := unfinished_steps(out):
            hashes["unfinished steps"] = describe_digest(unfinished)
        return hashes


def make_plan(study: StudyConfig) -> list[Step]:
    """Return the steps of a study, each after those that it needs, with those that are left out.

    Raises:
        UserError: A setting is invalid, or a model's config cannot be read.
    """
    arms = plan_arms(study)
    photos = len(open_split(study.probes.data, "validation"))
    analyses = chosen_analyses(study, photos)
    steps = []
    for label in study.models:
        of_model = [arm for arm in arms if arm.label == label]
        steps += [_step(arm) for arm in of_model]
        solved = [arm for arm in of_model if arm.name != FITTED]
        steps += [_step(_with_task(arm, task)) for task in study.tasks for arm in solved]
        steps += steps_of_runs(study, of_model, analyses, photos)
    steps += steps_of_models(study, arms, analyses)
    steps.append(_report(study, steps))
    chosen = [step for step in steps if study.only is None or step.kind in study.only]
    if not chosen:
        raise UserError(
            f"the study has no such step: --only {' '.join(study.only)}. fit needs --fit, starvation two models, "
            "routes a file of questions, other analyses --add NAME"
        )
    return chosen


def _with_task(arm: Arm, task: str) -> Arm:
    """Return an arm with targets of another task."""
    name = join(arm.label, f"{task}_{arm.name}")
    out = Path(arm.config.out).with_name(f"{task}_{arm.name}")
    return arm._replace(
        run=arm.run._replace(name=name),
        config=replace(arm.config, data=replace(arm.config.data, task=task), out=str(out)),
    )


def _step(arm: Arm) -> Step:
    """Return the step that makes the probe run of an arm."""
    why_left_out = arm.why_left_out
    if not arm.run.sites:
        changed = join(arm.label, arm.name)
        why_left_out = f"none of the sites that are probed is changed by {changed} (model.sites)"
    return Step(
        arm.run.name,
        arm.config,
        Path(arm.config.out) / "metrics.json",
        "fit" if arm.name == FITTED else "solve",
        takes_overwrite=True,
        why_left_out=why_left_out,
    )


def _report(study: StudyConfig, steps: Sequence[Step]) -> Step:
    """Return the step of the report, which reads the results of all others."""
    out = study.out / "report"
    results = {step.name: step.result for step in steps}
    return ReportStep(
        "report",
        ReportOptions(
            studies=(str(study.out),),
            out=out,
            labels=tuple(filter(None, study.models)),
        ),
        out / "results.json",
        kind="report",
        reads=results | {TRUTH_FILE: Path(study.probes.data.root) / TRUTH_FILE},
    )


def check(study: StudyConfig) -> None:
    """Raise a UserError if the study cannot be run: what is wrong is said before any work."""
    if study.draws < 0:
        raise UserError(f"--draws must be 0 or more, got {study.draws}")
    others = [task for task in TASKS if task != SEGMENTATION]
    for task in study.tasks:
        if task not in others:
            raise UserError(
                f"there is no task {task!r}; expected one of {', '.join(others)} (--tasks)"
            )
    kinds = ("solve", "fit", *ANALYSES, "report")
    for kind in study.only or ():
        if kind not in kinds:
            raise UserError(
                f"there is no step {kind!r}; expected some of {', '.join(kinds)} (--only)"
            )
    for key in ("untrained", "match", "draw"):
        if getattr(study.probes.model, key) not in (None, "none", 0):
            raise UserError(
                f"model.{key} is given, but the arms of a study say which weights are random (--arms)"
            )
    data = study.probes.data
    if data.task != SEGMENTATION:
        raise UserError(
            "data.task is given, but a study is of segmentation; it solves other tasks beside it with --tasks NAME"
        )
    if data.dataset == "folder" and not Path(data.root).is_dir():
        layouts = ", ".join(DATASETS)
        raise UserError(
            f"{data.root} is neither a folder of images and masks nor a layout ({layouts}); {HINT}"
        )
    validation = open_split(data, "validation")
    check_classes(chosen_analyses(study, len(validation)), validation.classes)
    for task in (SEGMENTATION, *study.tasks):
        for split in ("training", "validation"):
            open_split(replace(data, task=task), split)
