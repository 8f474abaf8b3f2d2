"""The plan of a study as values: its arms, and its steps in order.

A step is a call with its options, and says what it reads and writes: what was made from something else is made again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import yaml

from llava_bidir.common.cli import Parser
from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import (
    check_same_identity,
    code_of_user,
    describe_digest,
    named_identity,
)
from llava_bidir.common.imports import HINT
from probes.analyses import MEASURED
from probes.analyses.analysis import EFFECTS_SUFFIX
from probes.analyses.learning_curve import ANALYSIS as CURVE
from probes.analyses.learning_curve import check_sizes
from probes.config import DataOptions, ReportOptions, StudyOptions
from probes.data.image_dataset import ImageDataset
from probes.data.registry import DATASETS, identity_of_splits, open_splits
from probes.heads import LINEAR, factory_of
from probes.models.chosen import ChosenModel, choose_model
from probes.ops.geometry import SLIDE
from probes.report.claims import TRUTH_FILE
from probes.runs.read import finished_runs
from probes.steps.record import OUTSTANDING, Step, digest, read_records, unfinished_steps
from probes.tasks import SEGMENTATION, TASKS, find_task

from .arms import TRAINED, Arm, is_fitted, join, kind_of, plan_arms

RUNS = ("solve", "fit")  # kinds of steps whose result is a finished run
SHOWN_PHOTOS = 3  # with maps by layer, in a study of a bare encoder
Settings = dict[str, Any]  # values of options of an analysis, by name
# returns checksums of a model and of a task's images and targets
Content = Callable[[], dict[str, str]]


class Planned(NamedTuple):
    """A study before it is run.

    Args:
        models: Models by label.
        arms: All arms.
        steps: Each after those whose results it reads, with those that are left out.
        training: The training images.
        validation: The validation images.
        contents: What runs are made from, by label of the model and task.
    """

    models: Mapping[str, ChosenModel]
    arms: list[Arm]
    steps: list[Step]
    training: ImageDataset
    validation: ImageDataset
    contents: Mapping[tuple[str, str], Content]


@dataclass(frozen=True)
class ArmStep(Step):
    """A step of an arm; `is_trained` of the one whose model is as it is."""

    is_trained: bool = False


@dataclass(frozen=True)
class RunStep(ArmStep):
    """A probe run, which is made from a model and from images and targets."""

    content: Content = dict

    def inputs(self) -> dict[str, str | None]:
        """Return the checksums of model, images and targets."""
        return self.content()


@dataclass(frozen=True)
class ReportStep(Step):
    """The report, which reads all finished runs of the study's folder, those of earlier calls, too."""

    def inputs(self) -> dict[str, str | None]:
        """Return the hashes of all results, and one of what has no result."""
        out = self.result.parents[1]
        names = ["metrics.json", *(analysis.result for analysis in MEASURED.values())]
        runs = finished_runs(out)
        files = [run / name for run in runs for name in names]
        files += [file for run in runs for file in sorted(run.glob(f"*{EFFECTS_SUFFIX}"))]
        hashes = {str(file.relative_to(out)): digest(file) for file in files if file.is_file()}
        hashes[TRUTH_FILE] = digest(self.reads[TRUTH_FILE])
        if unfinished := unfinished_steps(out):
            hashes["unfinished steps"] = describe_digest(unfinished)
        return hashes


def plan(study: StudyOptions) -> Planned:
    """Return the arms and steps of a study. What is wrong is said before any work.

    Raises:
        UserError: A setting is invalid, or a model's config or a split cannot be read.
    """
    _check(study)
    models = {}
    not_there = None
    for label, path in study.models.items():
        try:
            models[label] = choose_model(replace(study.model, mllm=path))
        except UserError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            # said last: slurm/submit.sh checks a study whose model is not trained yet
            not_there = not_there or error
    _check_folder_of_data(study.data)
    main = study.data.task
    tasks = dict.fromkeys((main, *study.tasks))
    seed = study.seed_everything
    splits = {task: open_splits(replace(study.data, task=task), seed) for task in tasks}
    training, validation = splits[main]["training"], splits[main]["validation"]
    check_sizes(study.training_images, len(training))
    analyses = choose_analyses(study, validation)
    if not_there:
        raise not_there
    contents = {
        (label, task): cache(partial(_content, model, splits_of_task))
        for label, model in study.models.items()
        for task, splits_of_task in splits.items()
    }
    arms = plan_arms(study, models)
    steps: list[Step] = []
    for label in models:
        of_model = [arm for arm in arms if arm.label == label]
        steps += _run_steps(study, of_model, contents)
        steps += _analysis_steps(study, of_model, analyses=analyses, photos=len(validation))
        steps += _steps_of_other_tasks(study, of_model, analyses)
    steps.append(_report_step(study, steps))
    chosen = [step for step in steps if not study.only or step.kind in study.only]
    if not chosen:
        raise UserError(
            f"the study has no such step: --only {' '.join(study.only)}. fit needs --fit, "
            "routes a file of questions, other analyses --add NAME"
        )
    return Planned(
        models=models,
        arms=arms,
        steps=chosen,
        training=training,
        validation=validation,
        contents=contents,
    )


def _check(study: StudyOptions) -> None:
    """Raise a UserError if a setting is invalid; data are not looked at."""
    others = [task for task in TASKS if task != study.data.task]
    kinds = [*RUNS, *MEASURED, "report"]
    analyses = [text.partition(".")[0] for text in study.add]
    choices = (
        ("task", study.tasks, others),
        ("step", study.only, kinds),
        ("analysis", analyses, MEASURED),
    )
    for option, given, names in choices:
        for name in given:
            if name not in names:
                expected = ", ".join(names)
                raise UserError(
                    f"there is no {option} {name!r}; expected some of {expected}; {HINT}"
                )
    for key in ("untrained", "match", "draw"):
        if getattr(study.model, key) not in (None, "none", 0):
            raise UserError(
                f"model.{key} is given, but the arms of a study say which weights are random (--arms)"
            )
    if study.model.cut:
        raise UserError("model.cut is given, but a study has arms with and without it (--cuts)")
    if study.blank and study.model.image_resize == SLIDE:
        raise UserError(
            "--blank is about whole photos, and model.image_resize slide reads windows of them"
        )
    if study.training_images and study.data.task != SEGMENTATION:
        raise UserError(f"--training_images is about classes, and data.task is {study.data.task}")
    find_task(study.data.task)
    factory_of(study.model.head)
    if study.model.head != LINEAR and not study.fit:
        raise UserError(
            f"model.head is {study.model.head!r}, but only linear probes are solved; with --fit both heads are trained "
            "and compared"
        )


def _check_folder_of_data(data: DataOptions) -> None:
    """Raise a UserError if the data are neither a folder nor a layout."""
    if data.dataset == "folder" and not Path(data.root).is_dir():
        layouts = ", ".join(DATASETS)
        raise UserError(
            f"{data.root} is neither a folder of images and masks nor a layout ({layouts}); {HINT}"
        )


def _content(model: str, splits: Mapping[str, ImageDataset]) -> dict[str, str]:
    """Return the checksums of a model and of the splits of a task."""
    from probes.models.module_sources import source_identity  # imports transformers' models

    weights = named_identity({"mllm": source_identity(model)})
    images = identity_of_splits(splits)
    content = {f"model.{name}": value for name, value in weights.items()}
    return content | {f"data.{name}": value for name, value in images.items()}


# --------------------------------------------------------------------------------------------------------- steps
def _run_steps(
    study: StudyOptions, arms: Sequence[Arm], contents: Mapping[tuple[str, str], Content]
) -> list[RunStep]:
    """Return the steps that make the probe runs of a model: of its tasks, the main one first, all arms."""
    steps = []
    tasks = dict.fromkeys((study.data.task, *study.tasks))
    for task, arm in product(tasks, arms):
        if task == study.data.task or not is_fitted(arm.name):
            steps.append(_run_step(study, arm, task=task, content=contents[arm.label, task]))
    return steps


def _run_step(study: StudyOptions, arm: Arm, task: str, content: Content) -> RunStep:
    """Return the step that makes the probe run of an arm."""
    kind, call = "solve", "probes.solve.run:run_config"
    if is_fitted(arm.name):
        kind, call = "fit", "probes.fit.cli:run_fit"
    name = _name_of_run(study, arm, task)
    why_left_out = arm.why_left_out
    if not arm.run.sites:
        why_left_out = f"none of the sites that are probed is changed by {name} (model.sites)"
    folder = study.out / name
    data = replace(arm.config.data, task=task)
    return RunStep(
        name,
        config=replace(arm.config, data=data, out=str(folder)),
        result=folder / "metrics.json",
        kind=kind,
        call=call,
        takes_overwrite=True,
        why_left_out=why_left_out,
        is_trained=arm.is_trained,
        content=lambda: content() | code_of_user(factory_of(arm.config.model.head), TASKS[task]),
    )


def _analysis_steps(
    study: StudyOptions, arms: Sequence[Arm], analyses: Mapping[str, Settings], photos: int
) -> list[ArmStep]:
    """Return the steps that analyse the runs of a model."""
    has_llm = arms[0].run.has_llm
    if not has_llm and study.data.task == SEGMENTATION:  # maps of a few photos are made unasked
        shown = dict.fromkeys(i * photos // SHOWN_PHOTOS for i in range(SHOWN_PHOTOS))
        analyses = {"maps": {"image": list(shown)}, **analyses}
    steps = []
    for name, settings in analyses.items():
        analysis = MEASURED[name]
        analysed = [arm for arm in arms if kind_of(arm.name) in analysis.arms]
        analysed = [arm for arm in analysed if not (arm.why_left_out or arm.cut)]
        if not (has_llm or analysis.of_encoders):
            if name not in _asked(study):
                continue
            analysed = analysed[:1]  # left out, which is said once
        steps += [_analysis_step(study, arm, name=name, settings=settings) for arm in analysed]
    return steps


def _steps_of_other_tasks(
    study: StudyOptions, arms: Sequence[Arm], analyses: Mapping[str, Settings]
) -> list[ArmStep]:
    """Return the steps of the analyses of all tasks on a model's trained runs of the other tasks."""
    steps = []
    trained = [arm for arm in arms if arm.is_trained]
    for arm, task, name in product(trained, study.tasks, analyses):
        if MEASURED[name].every_task:
            run = arm.run._replace(name=_name_of_run(study, arm, task))
            of_task = arm._replace(run=run)
            steps.append(_analysis_step(study, of_task, name=name, settings=analyses[name]))
    return steps


def _name_of_run(study: StudyOptions, arm: Arm, task: str) -> str:
    """Return the name of the run of an arm and a task."""
    if task == study.data.task:
        return arm.run.name
    return join(arm.label, f"{task}_{Path(arm.run.name).name}")


def _analysis_step(study: StudyOptions, arm: Arm, name: str, settings: Settings) -> ArmStep:
    """Return the step that analyses a run; random controls do what was done in the trained arm."""
    analysis = MEASURED[name]
    run = arm.run.name
    folder = study.out / run
    reads = {run: folder / "metrics.json"}
    for option in analysis.beside_data:
        if option in settings:
            reads[f"{name}.{option}"] = Path(settings[option])
    if analysis.file:  # what it computes may have changed since
        reads[f"{name}.py"] = analysis.file
    reads |= {f"{run}/{other}": folder / f"{other}.json" for other in analysis.reads}
    settings = settings | {"probes": folder}
    follows = ""
    if not arm.is_trained and not is_fitted(arm.name):  # "probes" have mistakes of their own
        trained = join(arm.label, TRAINED)
        follows = f"{trained}/{name}"
        reads[trained] = study.out / trained / "metrics.json"
        if "like" in {option.name for option in fields(analysis.options)}:
            reads[follows] = study.out / trained / analysis.result
            settings["like"] = reads[follows]
    return ArmStep(
        f"{run}/{name}",
        config=Parser(analysis.options).read([], settings),
        result=folder / analysis.result,
        kind=name,
        call="probes.analyses:run",
        reads=reads,
        takes_overwrite=True,
        follows=follows,
        optional=True,
        why_left_out=analysis.why_left_out(arm.run, settings),
        is_trained=arm.is_trained,
    )


def _report_step(study: StudyOptions, steps: Sequence[Step]) -> ReportStep:
    """Return the step that writes the report of all other steps."""
    folder = study.out / "report"
    reads = {step.name: step.result for step in steps}
    reads[TRUTH_FILE] = Path(study.data.root) / TRUTH_FILE
    return ReportStep(
        "report",
        config=ReportOptions(
            studies=(str(study.out),), out=folder, labels=study.labels, margin=study.margin
        ),
        result=folder / "results.json",
        kind="report",
        call="probes.studies.table:write_report",
        reads=reads,
    )


def trained_first(steps: Sequence[Step]) -> list[Step]:
    """Return the steps of trained models first, then a report that names the outstanding controls, then the others.

    The report is made again at the end.
    """
    reports = [step for step in steps if step.kind == "report"]
    of_arms = [step for step in steps if step.kind != "report"]
    trained = [step for step in of_arms if step.is_trained]
    others = [step for step in of_arms if not step.is_trained]
    if not (reports and trained and any(step.kind in RUNS for step in others)):
        return list(steps)
    waiting = [replace(step, why_left_out=step.why_left_out or OUTSTANDING) for step in others]
    return [*trained, *waiting, *reports, *others, *reports]


# ------------------------------------------------------------------------------------------------------- analyses
def choose_analyses(study: StudyOptions, validation: ImageDataset) -> dict[str, Settings]:
    """Return the options of each analysis that is run; the default ones and those of `--add`.

    Raises:
        UserError: `--add` names no analysis or class, or an analysis whose file is missing.
    """
    chosen = {
        name: {**analysis.in_study}
        for name, analysis in MEASURED.items()
        if analysis.default and (analysis.of_any_task or study.data.task == SEGMENTATION)
    }
    for text in study.add:
        name, _, setting = text.partition(".")
        settings = chosen.setdefault(name, {**MEASURED[name].in_study})
        if setting:
            key, _, value = setting.partition("=")
            if not value:
                raise UserError(
                    f"--add {text}: expected NAME or NAME.OPTION=VALUE, e.g. knockout.classes=sky,road"
                )
            key = key.replace("-", "_")
            settings[key] = _read_value(MEASURED[name].options, key, value)
    if study.training_images:
        chosen[CURVE.name] = {"images": study.training_images}
    if "maps" in chosen and chosen["maps"]["image"] == MEASURED["maps"].in_study["image"]:
        chosen["maps"]["image"] = [n for n in chosen["maps"]["image"] if n < len(validation)]
    _add_files_beside_data(study, chosen)
    classes = validation.classes
    for name in chosen.get("knockout", {}).get("classes", ()):
        if not name.startswith("auto:") and name not in classes:
            expected = ", ".join(map(repr, classes))
            raise UserError(
                f"there is no class {name!r}; expected some of {expected} (--add); "
                'a name with a comma is given as knockout.classes=["a, b", "c"]'
            )
    return chosen


def _read_value(options: type, name: str, text: str) -> Any:
    """Return the value of an option of `--add`; of a list, its parts between commas, or a list of YAML."""
    if "tuple" not in str(get_type_hints(options).get(name)):
        return text
    if text.startswith("["):
        return yaml.safe_load(text)
    return text.split(",")


def _add_files_beside_data(study: StudyOptions, chosen: dict[str, Settings]) -> None:
    """Add the files that analyses need and that stand beside the data; leave out the analyses that have none.

    Raises:
        UserError: An analysis of `--add` has none.
    """
    for name in [*chosen]:
        for option, (file, content) in MEASURED[name].beside_data.items():
            beside = Path(study.data.root).resolve().parent / file
            if beside.is_file() and content in beside.read_bytes():
                chosen[name].setdefault(option, str(beside))
            if option in chosen[name]:
                continue
            if name in _asked(study):
                raise UserError(
                    f"--add {name} needs {beside} with {content.decode()}, or {name}.{option}=FILE"
                )
            del chosen[name]


def _asked(study: StudyOptions) -> set[str]:
    """Return the analyses that `--add` names."""
    return {text.partition(".")[0] for text in study.add}


# -------------------------------------------------------------------------------------------------------- folder
def check_folder(study: StudyOptions, planned: Planned) -> None:
    """Raise a UserError if the folder holds runs of other models, images or targets, which may not be overwritten."""
    held: dict[str, str] = {}  # models by label
    for record in read_records(study.out):
        run = study.out / record.step
        if record.kind not in RUNS or not (run / "metrics.json").is_file():
            continue
        options = record.tried.config
        model = options["model"]["mllm"]
        label = record.step.rpartition("/")[0]
        held.setdefault(label, model)
        content = planned.contents.get((label, options["data"]["task"]))
        if content and not study.overwrite:
            check_same_identity(
                {"settings": record.tried.inputs},
                current={"settings": content()},
                source=f"{run}, of {model},",
                advice="choose another --out, or --overwrite true",
            )
    labels = held.keys() | study.models.keys()
    if "" in labels and len(labels) > 1:
        raise UserError(
            f"{study.out} holds a study of {', '.join(held.values())}; with a label and without, a report would "
            "take one model for two; choose another --out"
        )
