"""The steps of a study, in order: each is one command of `probes`, with the folder or file that it writes.

An arm is a model with trained or random weights. Its name says which:

    trained       the checkpoint as it is
    random0, ...  a random LLM whose layers change the states as much as the trained ones, draw 0, 1, ...
    permuted0     the trained LLM with the entries of each weight matrix permuted
    adapter0      a random adapter
    untrained0    a random adapter and a random LLM

`--fit` adds `probes`, the trained model with probes that AdamW trained, as the paper does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from llava_bidir.common.errors import UserError
from probes.analyses import ANALYSES
from probes.data.registry import DATASETS, open_dataset
from probes.models.families import family_of
from probes.models.prompt_and_pixels import read_config
from probes.models.sites import site_names
from probes.tasks import TASKS

# The paper's protocol (configs/probes/folder.yaml) for `--fit`, if no config says otherwise.
FIT = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "6320", "--trainer.val_check_interval", "316")
FIT += ("--trainer.check_val_every_n_epoch", "null")


class Weights(NamedTuple):
    """Which weights of an arm are random, and the sites that they change."""

    options: tuple[str, ...]  # of `probes solve`
    sites: slice  # of the model's sites: a random LLM is compared from the adapter on, a random adapter up to it


ARMS = {
    "trained": Weights((), slice(None)),
    "random": Weights(("--model.untrained", "[llm]", "--model.match", "update"), slice(1, None)),
    "permuted": Weights(("--model.untrained", "[llm]", "--model.match", "permuted"), slice(1, None)),
    "adapter": Weights(("--model.untrained", "[adapter]"), slice(0, 2)),
    "untrained": Weights(("--model.untrained", "[adapter, llm]"), slice(1, None)),
}


@dataclass(frozen=True)
class Settings:
    """What a study is made of.

    Args:
        models: Checkpoint directory or hub id by label. One model has the label "".
        data: Folder of images and masks, or the name of a layout, whose folder `--data.root` gives.
        out: Folder of the study.
        draws: Draws of random LLMs and of random adapters.
        arms: Arms to solve; None for the trained one and `draws` of both.
        fit: Also train probes, as the paper does.
        tasks: Other tasks, each solved on the trained model and on one random LLM.
        add: Analyses to run besides the default ones, "NAME" or "NAME.OPTION=VALUE".
        only: Kinds of steps to run: "solve", "fit", "report", or an analysis; None for all.
        options: Further options of `probes solve` and `probes fit`.
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


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: Unique in the study, e.g. "causal/random0/knockout".
        command: Its words after `probes`.
        result: The file that says that it is done.
        kind: "solve", "fit", "report", or the name of an analysis.
        needs: Names of the arms whose results it reads; the report reads all.
    """

    name: str
    command: tuple[str, ...]
    result: Path
    kind: str
    needs: tuple[str, ...] = field(default=())


def make_plan(settings: Settings) -> list[Step]:
    """Return the steps of a study, each after those that it needs.

    Raises:
        UserError: A setting is invalid, or a model's config cannot be read.
    """
    arms, analyses, fitted = arm_names(settings), chosen_analyses(settings), ("probes",) if settings.fit else ()
    steps, report = [], settings.out / "report"
    for label, model in settings.models.items():
        steps += _runs(settings, label, model, arms)
        for name, options in analyses.items():
            if ANALYSES[name].of == "run":
                analysed = [arm for arm in (*arms, *fitted) if _kind(arm) in ANALYSES[name].arms]
                steps += [_analysis(settings, label, arm, name, options) for arm in analysed]
    for name, options in analyses.items() if "trained" in arms else ():
        if ANALYSES[name].of == "pair" and len(settings.models) == 2:
            steps += [_pair(settings, arm, name, options) for arm in ("trained", *fitted)]
        if ANALYSES[name].of == "page":
            runs = tuple(_join(label, "trained") for label in settings.models)
            words = (name, *(str(settings.out / run) for run in runs), *_words(options), "--out", str(report))
            steps.append(Step(name, words, report / ANALYSES[name].result, name, runs))
    steps.append(Step("report", ("report", str(settings.out), "--out", str(report)), report / "results.json", "report"))
    return [step for step in steps if settings.only is None or step.kind in settings.only]


def _runs(settings: Settings, label: str, model: str, arms: Sequence[str]) -> list[Step]:
    """Return the steps that make the probe runs of a model."""
    sites = model_sites(model)
    chosen = yaml.safe_load(_option(settings, "--model.sites") or "null") or sites
    given = {"solve": settings.options, "fit": _fit_options(settings)}
    base = (*data_options(settings), "--model.mllm", model, "--ckpt_path", "last")

    def run(arm: str, kind: str, name: str, more: Sequence[str] = ()) -> Step:
        weights, draw = ARMS[_kind(arm)], re.sub(r"\D", "", arm)
        options = [*more, *weights.options, *(["--model.draw", draw] if draw else ())]
        if weights.options:
            compared = [site for site in sites[weights.sites] if site in chosen]
            options += ["--model.sites", f"[{', '.join(compared)}]"]
        out = settings.out / _join(label, name)
        command = (kind, *given[kind], *base, *options, "--out", str(out))
        return Step(_join(label, name), command, out / "metrics.json", kind)

    steps = [run(arm, "solve", arm) for arm in arms]
    if settings.fit:
        configured = any(word.split("=")[0] in ("-c", "--config") for word in settings.options)
        steps.append(run("trained", "fit", "probes", () if configured else FIT))
    tasks = [(task, arm) for task in settings.tasks for arm in ("trained", "random0") if arm in arms]
    return steps + [run(arm, "solve", f"{task}_{arm}", ["--data.task", task]) for task, arm in tasks]


def _fit_options(settings: Settings) -> list[str]:
    """Return the further options without those that only the solver has."""
    if not settings.fit:
        return []
    from probes.training.solve import build_parser  # Lightning takes a second to import

    return build_parser().parse_known_args(settings.options)[1]


def arm_names(settings: Settings) -> list[str]:
    """Return the names of the arms, the trained one first."""
    if settings.arms is None:
        return ["trained", *(f"{kind}{draw}" for kind in ("random", "adapter") for draw in range(settings.draws))]
    for name in settings.arms:
        if not re.fullmatch(r"trained|(random|permuted|adapter|untrained)\d{1,3}", name):
            known = "trained, random0, permuted0, adapter0, untrained0, or another draw"
            raise UserError(f"there is no arm {name!r}; expected {known} (--arms)")
    return sorted(dict.fromkeys(settings.arms), key=lambda name: name != "trained")


def chosen_analyses(settings: Settings) -> dict[str, dict[str, str]]:
    """Return the options of each analysis that is run; the default ones and those of `--add`."""
    chosen = {name: dict(analysis.options) for name, analysis in ANALYSES.items() if analysis.default}
    for text in settings.add:
        name, _, setting = text.partition(".")
        if name not in ANALYSES:
            raise UserError(f"there is no analysis {name!r}; expected one of {', '.join(ANALYSES)} (--add)")
        options = chosen.setdefault(name, dict(ANALYSES[name].options))
        if setting:
            key, equals, value = setting.partition("=")
            if not (key and equals and value):
                raise UserError(f"--add {text}: expected NAME or NAME.OPTION=VALUE, e.g. knockout.classes=sky,road")
            options[key] = value
    for name in [*chosen]:
        for option, (file, content) in ANALYSES[name].beside_data.items():
            beside = Path(data_root(settings)).parent / file
            if beside.is_file() and content in beside.read_bytes():
                chosen[name].setdefault(option, str(beside))
            if option not in chosen[name]:
                del chosen[name]
    return chosen


def data_options(settings: Settings) -> list[str]:
    """Return the options that say where the images are."""
    if settings.data in DATASETS:
        return ["--data.dataset", settings.data, "--data.name", settings.data]
    return ["--data.root", settings.data]


def data_root(settings: Settings) -> str:
    """Return the folder of the images, as far as this command knows it."""
    if settings.data not in DATASETS:
        return settings.data
    if root := _option(settings, "--data.root"):
        return root
    raise UserError(f"the layout {settings.data} needs the folder of its images: --data.root DIR")


def _option(settings: Settings, name: str) -> str | None:
    """Return the value of an option of `probes solve`, None if it is not given."""
    words = [word for option in settings.options for word in option.split("=", 1)]
    return words[words.index(name) + 1] if name in words[:-1] else None


def open_split(settings: Settings, split: str):
    """Return the dataset of a split; a UserError says if it has no images."""
    dataset = settings.data if settings.data in DATASETS else "folder"
    return open_dataset(dataset, data_root(settings), split)


def model_sites(model: str) -> list[str]:
    """Return the sites of a model, from its config."""
    config = read_config(model)
    family_of(config)
    return site_names(config.get_text_config().num_hidden_layers)


def check(settings: Settings) -> None:
    """Raise a UserError if the study cannot be run: what is wrong is said before any work."""
    if settings.draws < 0:
        raise UserError(f"--draws must be 0 or more, got {settings.draws}")
    for task in settings.tasks:
        if task not in TASKS:
            raise UserError(f"there is no task {task!r}; expected one of {', '.join(TASKS)} (--tasks)")
    kinds = ("solve", "fit", *ANALYSES, "report")
    for kind in settings.only or ():
        if kind not in kinds:
            raise UserError(f"there is no step {kind!r}; expected some of {', '.join(kinds)} (--only)")
    root = Path(data_root(settings))
    if settings.data not in DATASETS and not root.is_dir():
        layouts = ", ".join(DATASETS)
        raise UserError(f"{settings.data} is neither a folder of images and masks nor a layout ({layouts})")
    classes = open_split(settings, "validation").classes
    asked = chosen_analyses(settings).get("knockout", {}).get("classes", "auto:").split(",")
    if unknown := [name for name in asked if not name.startswith("auto:") and name not in classes]:
        raise UserError(f"there is no class {unknown[0]!r}; expected some of {', '.join(classes)} (--add)")
    open_split(settings, "training")


def _kind(arm: str) -> str:
    return arm.rstrip("0123456789")


def _join(label: str, name: str) -> str:
    return f"{label}/{name}" if label else name


def _words(options: dict[str, str]) -> list[str]:
    """Return {"classes": "sky,road", "by-class": "true"} as --classes sky road --by-class."""
    words: list[str] = []
    for key, value in options.items():
        words += [f"--{key}", *([] if value == "true" else value.split(","))]
    return words


def _analysis(settings: Settings, label: str, arm: str, name: str, options: dict[str, str]) -> Step:
    run = settings.out / _join(label, arm)
    command = (name, "--probes", str(run), *_words(options))
    needs = tuple(_join(label, other) for other in dict.fromkeys((arm, "trained")))
    return Step(f"{_join(label, arm)}/{name}", command, run / ANALYSES[name].result, name, needs)


def _pair(settings: Settings, arm: str, name: str, options: dict[str, str]) -> Step:
    runs = [_join(label, arm) for label in settings.models]
    command = (name, "--probes", *(str(settings.out / run) for run in runs), *_words(options))
    return Step(f"{runs[1]}/{name}", command, settings.out / runs[1] / ANALYSES[name].result, name, tuple(runs))
