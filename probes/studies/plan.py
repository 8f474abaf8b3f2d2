"""The steps of a study, in order: each is a call with its options as values, and the folder or file that it writes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import (
    check_same_identity,
    describe_digest,
    named_identity,
)
from llava_bidir.common.imports import HINT
from probes.analyses import MEASURED
from probes.analyses.base import EFFECTS
from probes.data.registry import DATASETS, open_split, split_identity
from probes.report.options import ReportOptions
from probes.report.truth import FILE as TRUTH_FILE
from probes.run_config import DataOptions
from probes.runs.finished_run import FinishedRun
from probes.runs.runs import finished_runs, open_run
from probes.runs.steps import study_folder, unfinished_steps
from probes.steps import Step, digest, find_missing
from probes.tasks import SEGMENTATION, TASKS

from .analyses import check_classes, chosen_analyses, steps_of_runs
from .arms import FITTED, Arm, join, plan_arms
from .config import StudyConfig

RUNS = ("solve", "fit")  # kinds of steps whose result is a finished run


@dataclass(frozen=True)
class ReportStep(Step):
    """The report, which reads all finished runs of the study's folder, those of earlier calls, too."""

    def inputs(self) -> dict[str, str | None]:
        """Return the hashes of all results, and one of what has no result."""
        out = self.result.parents[1]
        names = ["metrics.json", *(analysis.result for analysis in MEASURED.values())]
        runs = finished_runs(out)
        files = [run / name for run in runs for name in names]
        files += [file for run in runs for file in sorted(run.glob(f"*{EFFECTS}"))]
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
    steps.append(_report(study, steps))
    chosen = [step for step in steps if study.only is None or step.kind in study.only]
    if not chosen:
        raise UserError(
            f"the study has no such step: --only {' '.join(study.only)}. fit needs --fit, "
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
    kinds = ("solve", "fit", *MEASURED, "report")
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


def find_work(study: StudyConfig, steps: list[Step], overwrite: bool) -> list[Step]:
    """Return the steps of a study that are missing or were made from something else; print why one is done again.

    Raises:
        UserError: The folder holds results of other models, images or targets, which may not be overwritten.
    """
    changed = _changed_runs(study, overwrite)
    return find_missing(steps, study.out, lambda step: changed.get(step.name, ""))


def _changed_runs(study: StudyConfig, overwrite: bool) -> dict[str, str]:
    """Return how the folder's finished runs, by name, differ from the study in weights, images or targets, if they do.

    Raises:
        UserError: There are some, and they may not be overwritten, or the folder holds a study of other models.
    """
    changed = {}
    checked: dict[str, str] = {}  # by what runs were made from: the difference
    held: dict[str, str] = {}  # models by label
    for path in finished_runs(study.out):
        if study_folder(path) not in (None, study.out):  # as in a demo's folder
            continue
        run = open_run(path)
        *_, label = ["", *path.relative_to(study.out).parts[:-1]]
        if study_folder(path):
            held.setdefault(label, run.metrics["mllm"])
        if label not in study.models or run.task_name not in (SEGMENTATION, *study.tasks):
            continue
        parts = [run.manifest["identity"][section] for section in ("data", "model")]
        made_from = json.dumps([label, run.task_name, *parts])
        if made_from not in checked:
            checked[made_from] = _what_has_changed(run, study.models[label], study.probes.data)
        if checked[made_from]:
            changed[path.relative_to(study.out).as_posix()] = checked[made_from]
    labels = held.keys() | study.models.keys()
    if "" in labels and len(labels) > 1:  # a report would take one model for two
        raise UserError(
            f"{study.out} holds a study of {_describe_models(held)}, and this one is of "
            f"{_describe_models(study.models)}; choose another --out"
        )
    if changed and not overwrite:
        raise UserError(next(iter(changed.values())))
    return changed


def _what_has_changed(run: FinishedRun, model: str, data: DataOptions) -> str:
    """Return how model, images and targets differ from those that a run was made from; "" if they do not."""
    from probes.models.module_sources import source_identity  # imports transformers' models

    now = {"model": named_identity({"mllm": source_identity(model)}), "data": {}}
    for split in ("training", "validation"):
        dataset = open_split(replace(data, task=run.task_name), split)
        now["data"] |= split_identity(split, dataset)
    saved = {section: run.manifest["identity"][section] for section in now}
    source = f"{run.path}, of {run.metrics['mllm']} on {run.manifest['data']['root']},"
    try:
        check_same_identity(saved, now, source, "choose another --out, or --overwrite true")
    except UserError as error:
        return str(error)
    return ""


def _describe_models(models: dict[str, str]) -> str:
    return ", ".join(f"{label}={path}" if label else path for label, path in models.items())
