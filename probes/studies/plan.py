"""The steps of a study, in order: each is a call with its options as values, and the folder or file that it writes.

An arm is a model with trained or random weights. Its name says which:

    trained       the checkpoint as it is
    random0, ...  a random LLM whose layers change the states as much as the trained ones, draw 0, 1, ...
    permuted0     the trained LLM with the entries of each weight matrix permuted
    adapter0      a random adapter
    untrained0    a random adapter and a random LLM

Of a bare vision encoder, `random` and `permuted` are the encoder's layers, and there are no other controls.

A claim is compared with `random` and with `permuted` arms, and must hold beyond both: a model that has learned nothing
can differ from all draws of one kind, e.g. by the scale of its weights (probes/worlds/beyond_random.md).

`--fit` adds `probes`, the trained model with probes that AdamW trained, as the paper does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from llava_bidir.common.configs import configs_in, with_config_paths
from llava_bidir.common.errors import UserError
from llava_bidir.common.identity import describe_digest
from llava_bidir.common.steps import Step, digest
from probes.analyses import ANALYSES
from probes.analyses.base import PlannedRun
from probes.analyses.effects import effects_path
from probes.analyses.options import options_of, read_text
from probes.data.registry import DATASETS, open_dataset
from probes.models.families import family_of, own_image_attention
from probes.models.families.encoder_layers import encoder_layers
from probes.models.prompt_and_pixels import read_config
from probes.models.sites import is_encoder_layer, wants_all
from probes.report.truth import FILE as TRUTH_FILE
from probes.results.runs import finished_runs
from probes.results.steps import unfinished_steps
from probes.tasks import SEGMENTATION, TASKS

Config = dict[str, Any]  # options by name, nested as in YAML
# The paper's protocol (configs/probes/folder.yaml) for `--fit`, if no config says otherwise.
FIT = (
    "--trainer.max_epochs",
    "-1",
    "--trainer.max_steps",
    "6320",
    "--trainer.val_check_interval",
    "316",
)
FIT += ("--trainer.check_val_every_n_epoch", "null")


class Weights(NamedTuple):
    """Which weights of an arm are random, and the sites that they change."""

    parts: tuple[str, ...]
    match: str  # how random layers resemble the trained ones
    # of the model's sites: a random LLM is compared from the adapter on, a random adapter up to it
    sites: slice

    def options(self, draw: int, sites: list[str]) -> Config:
        """Return the options of the model in a config of `probes solve`; {} if no weights are random."""
        if not self.parts:
            return {}
        return {
            "untrained": list(self.parts),
            "match": self.match,
            "draw": draw,
            "sites": sites,
        }


ARMS = {
    "trained": Weights((), "none", slice(None)),
    "random": Weights(("llm",), "update", slice(1, None)),
    "permuted": Weights(("llm",), "permuted", slice(1, None)),
    "adapter": Weights(("adapter",), "none", slice(0, 2)),
    "untrained": Weights(("adapter", "llm"), "none", slice(1, None)),
}
ENCODER_ARMS = {
    "trained": ARMS["trained"],
    "random": Weights(("encoder",), "update", slice(None)),
    "permuted": Weights(("encoder",), "permuted", slice(None)),
}
SHOWN_PHOTOS = 3  # with maps by layer, in a study of a bare encoder
# Of any study: the fewest with an interval. Their spread is pooled with that of the other draws.
PERMUTED_DRAWS = 2


@dataclass(frozen=True)
class Settings:
    """What a study is made of.

    Args:
        models: Checkpoint directory or hub id by label. One model has the label "".
        data: Folder of images and masks, or the name of a layout, whose folder `--data.root` gives.
        out: Folder of the study.
        draws: Draws of random LLMs and of random adapters; of a bare encoder, of random layers. At most two are also
            permuted.
        arms: Arms to solve; None for the trained one and all draws.
        fit: Also train probes, as the paper does.
        tasks: Other tasks, each solved on all arms.
        add: Analyses to run besides the default ones, "NAME" or "NAME.OPTION=VALUE".
        only: Kinds of steps to run: "solve", "fit", "report", or an analysis; None for all.
        options: Words of further options of `probes solve` and `probes fit`, parsed once: `solve`, `trained`.
    """

    models: dict[str, str]
    data: str
    out: Path
    draws: int = 3
    arms: tuple[str, ...] | None = None
    fit: bool = False
    tasks: tuple[str, ...] = ()
    add: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    options: tuple[str, ...] = ()

    @cached_property
    def solve(self) -> Config:
        """All options of `probes solve` as values; each arm has a model, weights and a folder of its own."""
        return self._read_options()

    @cached_property
    def trained(self) -> Config:
        """All options of `probes fit`: the paper's protocol, unless there is a config."""
        from probes.training.solve.command import OF_SOLVER

        config = self._read_options(*([] if any(configs_in(self.options)) else FIT))
        return {name: value for name, value in config.items() if name not in OF_SOLVER}

    def _read_options(self, *defaults: str) -> Config:
        from probes.training.solve.command import read_config  # Lightning takes a second to import

        where = ["--data.dataset" if self.data in DATASETS else "--data.root", self.data]
        words = [*defaults, *with_config_paths(self.options), *where]
        words += ["--model.mllm", next(iter(self.models.values())), "--ckpt_path", "last"]
        config = read_config(words, "probes study")
        if self.data in DATASETS and config["data"]["name"] is None:
            return replaced(config, data={"name": self.data})
        return config


def replaced(config: Config, **values: Any) -> Config:
    """Return a config with other values; of a section, which is a dict, with other entries."""
    merged = {
        name: config[name] | value if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return config | merged


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


def make_plan(settings: Settings) -> list[Step]:
    """Return the steps of a study, each after those that it needs, with those that are left out.

    Raises:
        UserError: A setting is invalid, or a model's config cannot be read.
    """
    analyses = chosen_analyses(settings)
    fitted = ("probes",) if settings.fit else ()
    steps = []
    report = settings.out / "report"
    planned = planned_runs(settings, fitted)
    arms_of = {}
    for label, model in settings.models.items():
        has_llm = _has_llm(planned, label)
        arms = arms_of[label] = arm_names(settings, has_llm)
        steps += _runs(settings, label, model, arms, planned)
        for name, options in (analyses if has_llm else _with_maps(settings, analyses)).items():
            if ANALYSES[name].of == "run":
                analysed = [arm for arm in (*arms, *fitted) if _kind(arm) in ANALYSES[name].arms]
                if not has_llm and not ANALYSES[name].of_encoders:
                    analysed = analysed[:1]  # said once
                runs = [planned[_join(label, arm)] for arm in analysed]
                steps += [_analysis(settings, label, run, name, options) for run in runs]
    if not all("trained" in arms for arms in arms_of.values()):
        analyses = {}  # nothing to compare
    for name, options in analyses.items():
        if ANALYSES[name].of == "pair" and len(settings.models) == 2:
            for arm in ("trained", *fitted):
                pair = [planned[_join(label, arm)] for label in settings.models]
                steps.append(_pair(settings, pair, name, options))
        if ANALYSES[name].of == "page":
            steps.append(_page(settings, planned, name, options))
    steps.append(
        ReportStep(
            "report",
            {"runs": [str(settings.out)], "out": str(report), "tasks": [], "timings": None},
            report / "results.json",
            kind="report",
            reads={step.name: step.result for step in steps}
            | {TRUTH_FILE: Path(data_root(settings)) / TRUTH_FILE},
        )
    )
    chosen = [step for step in steps if settings.only is None or step.kind in settings.only]
    if not chosen:
        raise UserError(
            f"the study has no such step: --only {' '.join(settings.only)}. fit needs --fit, starvation two models, "
            "answers and routes a file of questions, other analyses --add NAME"
        )
    return chosen


def _has_llm(planned: Mapping[str, PlannedRun], label: str) -> bool:
    """Return whether the model of a label has an LLM."""
    return next(run.has_llm for name, run in planned.items() if name.startswith(_join(label, "")))


def _with_maps(settings: Settings, analyses: dict[str, Config]) -> dict[str, Config]:
    """Return the analyses of a bare encoder: maps of a few photos are among them unasked."""
    photos = len(open_split(settings, "validation"))
    shown = dict.fromkeys(i * photos // SHOWN_PHOTOS for i in range(SHOWN_PHOTOS))
    return {"maps": {"image": list(shown)}} | analyses


def _weights(arm: str, has_llm: bool) -> Weights:
    """Return which weights of an arm are random; `probes` are of the trained model."""
    kinds = ARMS if has_llm else ENCODER_ARMS
    return kinds["trained" if arm == "probes" else _kind(arm)]


def planned_runs(settings: Settings, fitted: Sequence[str]) -> dict[str, PlannedRun]:
    """Return the probe runs of all models by name: their mask and sites."""
    planned = {}
    options = settings.solve["model"]
    for label, model in settings.models.items():
        has_llm, own_mask, sites = describe_model(model, options["image_px"])
        probed = chosen_sites(model, sites, options["sites"])
        mask = options["image_attention"] or own_mask
        for arm in (*arm_names(settings, has_llm), *fitted):
            weights = _weights(arm, has_llm)
            compared = [site for site in sites[weights.sites] if site in probed]
            if (
                not weights.parts
            ):  # all random models share the encoder, so only this one reads its layers
                compared = [*filter(is_encoder_layer, probed), *compared]
            planned[_join(label, arm)] = PlannedRun(
                _join(label, arm),
                mask,
                compared,
                sites,
                has_llm,
            )
    return planned


def chosen_sites(model: str, sites: list[str], chosen: list[str] | str | None) -> list[str]:
    """Return the sites that `model.sites` chooses, in forward order: `sites` for None.

    Raises:
        UserError: A site is unknown, or is a layer of an encoder whose layers cannot be read.
    """
    if not chosen:
        return sites
    known = sites
    in_encoder = [site for site in chosen if is_encoder_layer(site)]
    if in_encoder or wants_all(chosen):
        config = read_config(model)
        family = family_of(config)
        if family.has_llm:
            known = [*encoder_layers(family, config).sites, *sites]
    if wants_all(chosen):
        return known
    if unknown := [site for site in chosen if site not in known]:
        some = f"{', '.join(known[:3])}, ..., {known[-1]}"
        raise UserError(f"{model} has no site {unknown[0]!r}; it has {some} (model.sites)")
    return [site for site in known if site in chosen]


def _runs(
    settings: Settings,
    label: str,
    model: str,
    arms: Sequence[str],
    planned: Mapping[str, PlannedRun],
) -> list[Step]:
    """Return the steps that make the probe runs of a model."""

    def run(kind: str, arm: str, name: str, **options: Config) -> Step:
        made = planned[_join(label, "probes" if kind == "fit" else arm)]
        weights = _weights(arm, made.has_llm)
        draw = int(re.sub(r"\D", "", arm) or 0)
        out = settings.out / _join(label, name)
        config = replaced(
            settings.trained if kind == "fit" else settings.solve,
            model={"mllm": model} | weights.options(draw, made.sites),
            out=str(out),
            **options,
        )
        unchanged = (
            f"none of the sites that are probed is changed by {_join(label, arm)} (model.sites)"
        )
        return Step(
            _join(label, name),
            config,
            out / "metrics.json",
            kind,
            takes_overwrite=True,
            why_left_out="" if made.sites else unchanged,
        )

    steps = [run("solve", arm, arm) for arm in arms]
    if settings.fit:
        steps.append(run("fit", "trained", "probes"))
    return steps + [
        run("solve", arm, f"{task}_{arm}", data={"task": task})
        for task in settings.tasks
        for arm in arms
    ]


def arm_names(settings: Settings, has_llm: bool = True) -> list[str]:
    """Return the names of the arms of a model, the trained one first.

    Raises:
        UserError: There is no such arm.
    """
    if settings.arms is not None and not settings.arms:
        raise UserError("arms is empty; expected trained, random0, ... (--arms)")
    if settings.arms is None:
        draws = {"random": settings.draws, "permuted": min(settings.draws, PERMUTED_DRAWS)}
        draws |= {"adapter": settings.draws} if has_llm else {}
        return ["trained", *(f"{kind}{i}" for kind, count in draws.items() for i in range(count))]
    for name in settings.arms:
        if not has_llm and _kind(name) in ARMS.keys() - ENCODER_ARMS.keys():
            known = "trained, random0, permuted0, or another draw"
            raise UserError(
                f"arm {name!r} needs an LLM, and the model is a vision encoder; expected {known} (--arms)"
            )
        if not re.fullmatch(r"trained|(random|permuted|adapter|untrained)\d{1,3}", name):
            known = "trained, random0, permuted0, adapter0, untrained0, or another draw"
            raise UserError(f"there is no arm {name!r}; expected {known} (--arms)")
    return sorted(dict.fromkeys(settings.arms), key=lambda name: name != "trained")


def chosen_analyses(settings: Settings) -> dict[str, Config]:
    """Return the options of each analysis that is run; the default ones and those of `--add`."""
    chosen = {
        name: dict(analysis.in_study) for name, analysis in ANALYSES.items() if analysis.default
    }
    for text in settings.add:
        name, _, setting = text.partition(".")
        if name not in ANALYSES:
            raise UserError(
                f"there is no analysis {name!r}; expected one of {', '.join(ANALYSES)} (--add)"
            )
        options = chosen.setdefault(name, dict(ANALYSES[name].in_study))
        if setting:
            key, equals, value = setting.partition("=")
            if not (key and equals and value):
                raise UserError(
                    f"--add {text}: expected NAME or NAME.OPTION=VALUE, e.g. knockout.classes=sky,road"
                )
            key = key.replace("-", "_")
            options[key] = read_text(name, key, value)
    named = {text.partition(".")[0] for text in settings.add}
    for name, option in (("maps", "image"), ("explore", "images")):
        if name in chosen and chosen[name][option] == ANALYSES[name].in_study[option]:
            chosen[name][option] = _within(
                len(open_split(settings, "validation")), chosen[name][option]
            )
    for name in [*chosen]:
        for option, (file, content) in ANALYSES[name].beside_data.items():
            beside = Path(data_root(settings)).resolve().parent / file
            if beside.is_file() and content in beside.read_bytes():
                chosen[name].setdefault(option, str(beside))
            if option in chosen[name]:
                continue
            if name in named:
                raise UserError(
                    f"--add {name} needs {beside} with {content.decode()}, or {name}.{option}=FILE"
                )
            del chosen[name]
    return chosen


def _within(images: int, numbers: Sequence[int]) -> list[int]:
    """Return those of the numbers that are below the number of images."""
    return [number for number in numbers if number < images]


def data_root(settings: Settings) -> str:
    """Return the folder of the images."""
    return settings.solve["data"]["root"]


def open_split(settings: Settings, split: str, task: str = SEGMENTATION):
    """Return the dataset of a split with the targets of a task; a UserError says if it has no images or targets."""
    dataset = settings.data if settings.data in DATASETS else "folder"
    options = settings.solve["data"]["options"]
    return open_dataset(dataset, data_root(settings), split, options, TASKS[task].targets)


def describe_model(model: str, image_px: int | None = None) -> tuple[bool, str, list[str]]:
    """Return whether a model has an LLM, the mask that it was trained with, and its sites, from its config.

    Raises:
        UserError: It takes no input of this side.
    """
    config = read_config(model)
    family = family_of(config)
    if image_px is not None:
        family.with_side(image_px, config)
    return family.has_llm, own_image_attention(config), family.sites(config)


def check(settings: Settings) -> None:
    """Raise a UserError if the study cannot be run: what is wrong is said before any work."""
    if settings.draws < 0:
        raise UserError(f"--draws must be 0 or more, got {settings.draws}")
    others = [task for task in TASKS if task != SEGMENTATION]
    for task in settings.tasks:
        if task not in others:
            raise UserError(
                f"there is no task {task!r}; expected one of {', '.join(others)} (--tasks)"
            )
    kinds = ("solve", "fit", *ANALYSES, "report")
    for kind in settings.only or ():
        if kind not in kinds:
            raise UserError(
                f"there is no step {kind!r}; expected some of {', '.join(kinds)} (--only)"
            )
    for key in ("untrained", "match", "draw"):
        if settings.solve["model"][key] not in (None, "none", 0):
            raise UserError(
                f"model.{key} is given, but the arms of a study say which weights are random (--arms)"
            )
    if settings.solve["data"]["task"] != SEGMENTATION:
        raise UserError(
            "data.task is given, but a study is of segmentation; it solves other tasks beside it with --tasks NAME"
        )
    root = Path(data_root(settings))
    if settings.data not in DATASETS and not root.is_dir():
        layouts = ", ".join(DATASETS)
        raise UserError(
            f"{settings.data} is neither a folder of images and masks nor a layout ({layouts})"
        )
    classes = open_split(settings, "validation").classes
    asked = chosen_analyses(settings).get("knockout", {}).get("classes", ())
    if unknown := [name for name in asked if not name.startswith("auto:") and name not in classes]:
        raise UserError(
            f"there is no class {unknown[0]!r}; expected some of {', '.join(map(repr, classes))} (--add); "
            'a name with a comma is given as knockout.classes=["a, b", "c"]'
        )
    open_split(settings, "training")
    for task in settings.tasks:
        for split in ("training", "validation"):
            open_split(settings, split, task)


def _kind(arm: str) -> str:
    return arm.rstrip("0123456789")


def _join(label: str, name: str) -> str:
    return f"{label}/{name}" if label else name


def read_analysis_options(name: str, values: Config) -> Config:
    """Return all options of an analysis as values of JSON.

    Raises:
        UserError: The analysis has no such option, or it cannot have this value.
    """
    return json.loads(json.dumps(asdict(options_of(name, values)), default=str))


def _analysis(
    settings: Settings,
    label: str,
    planned: PlannedRun,
    name: str,
    options: Config,
) -> Step:
    """Return the step that analyses a run; random controls also read what was analysed in the trained arm."""
    run = settings.out / planned.name
    trained = _join(label, "trained")
    is_control = planned.name not in (
        trained,
        _join(label, "probes"),
    )  # "probes" have mistakes of their own
    return Step(
        f"{planned.name}/{name}",
        read_analysis_options(name, options | {"probes": str(run)}),
        run / ANALYSES[name].result,
        kind=name,
        reads=_metrics(settings, (planned.name, trained) if is_control else (planned.name,))
        | _files(name, options)
        | _results(settings, [planned.name], name),
        takes_overwrite=True,
        # a knockout is then run with the classes of this step (run._same_classes), not those of its config
        follows=f"{trained}/{name}" if is_control else "",
        optional=True,
        why_left_out=ANALYSES[name].why_left_out([planned], options),
    )


def _pair(
    settings: Settings,
    pair: Sequence[PlannedRun],
    name: str,
    options: Config,
) -> Step:
    """Return the step that compares two runs, the causal one first, whatever the order of the models."""
    pair = sorted(pair, key=lambda run: run.mask != "causal")
    runs = tuple(run.name for run in pair)
    return Step(
        f"{runs[1]}/{name}",
        read_analysis_options(
            name, options | {"probes": [str(settings.out / run) for run in runs]}
        ),
        settings.out / runs[1] / ANALYSES[name].result,
        kind=name,
        reads=_metrics(settings, runs),
        takes_overwrite=True,
        optional=True,
        why_left_out=ANALYSES[name].why_left_out(pair, options),
    )


def _files(name: str, options: Config) -> dict[str, Path]:
    """Return the files that stand beside the data and that an analysis reads, by their options."""
    return {
        f"{name}.{option}": Path(options[option])
        for option in ANALYSES[name].beside_data
        if option in options
    }


def _results(settings: Settings, runs: Sequence[str], name: str) -> dict[str, Path]:
    """Return the results of other analyses that an analysis reads where there are some, by run and analysis."""
    return {
        f"{run}/{other}": settings.out / run / ANALYSES[other].result
        for run in runs
        for other in ANALYSES[name].reads
    }


def _page(
    settings: Settings,
    planned: dict[str, PlannedRun],
    name: str,
    options: Config,
) -> Step:
    """Return the step of an analysis that draws a page of all trained models."""
    runs = tuple(_join(label, "trained") for label in settings.models)
    report = settings.out / "report"
    folders = [str(settings.out / run) for run in runs]
    return Step(
        name,
        read_analysis_options(name, options | {"runs": folders, "out": str(report)}),
        report / ANALYSES[name].result,
        kind=name,
        reads=_metrics(settings, runs) | _results(settings, runs, name),
        optional=True,
        why_left_out=ANALYSES[name].why_left_out([planned[run] for run in runs], options),
    )


def _metrics(settings: Settings, runs: Sequence[str]) -> dict[str, Path]:
    """Return the file that says that a run is finished, by the run's name."""
    return {run: settings.out / run / "metrics.json" for run in runs}
