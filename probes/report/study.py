"""The runs of a report, sorted: by model and dataset, and there by mask, each trained and, as a control, untrained."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_bidir.common.errors import UserError
from probes.analyses.starvation.run import starvation
from probes.results.probe_run import ProbeRun, read_tensors

Rows = list[dict[str, Any]]  # of a table: by column

MASKS = ("causal", "bidirectional")


@dataclass
class Study:
    """One model on one dataset, under each mask.

    Args:
        model, dataset: Their names.
        trained, untrained: Runs by mask.
        longer: The trained models again, with longer-trained probes.
        recipes: The trained models again, with further recipes; empty where the trained runs have them themselves.
    """

    model: str
    dataset: str
    trained: dict[str, ProbeRun] = field(default_factory=dict)
    untrained: dict[str, ProbeRun] = field(default_factory=dict)
    longer: dict[str, ProbeRun] = field(default_factory=dict)
    recipes: dict[str, ProbeRun] = field(default_factory=dict)

    @property
    def runs(self) -> list[ProbeRun]:
        return [*self.trained.values(), *self.untrained.values()]

    @property
    def first(self) -> ProbeRun:
        return next(iter(self.trained.values()))

    @property
    def by_recipe(self) -> dict[str, ProbeRun]:
        """The runs in which recipes are compared, by mask."""
        return {mask: self.recipes.get(mask, run) for mask, run in self.trained.items()}

    @property
    def title(self) -> str:
        return f"{self.model}, {self.dataset}"

    @property
    def slug(self) -> str:
        """The study's name as the name of a folder."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.model}_{self.dataset}")

    def pair(self, untrained: bool = False) -> tuple[ProbeRun, ProbeRun] | None:
        """The causal and the bidirectional run; None unless there are both."""
        runs = self.untrained if untrained else self.trained
        return (runs[MASKS[0]], runs[MASKS[1]]) if set(MASKS) <= set(runs) else None

    def starvation(self, untrained: bool = False) -> dict[str, Any] | None:
        """Accuracy by patch, causal against bidirectional; None unless there are both runs."""
        pair = self.pair(untrained)
        return starvation(*pair) if pair else None

    def _add(self, run: ProbeRun) -> None:
        kind = self.untrained if run.metrics["untrained"] else self.trained
        mask = run.metrics["image_attention"]
        if mask in kind:
            what = "untrained" if run.metrics["untrained"] else "trained"
            raise UserError(
                f"{kind[mask].path} and {run.path} are both the {what} run under {mask!r} of {self.title}; give one, "
                f"or say which model each is of: NAME={run.path}"
            )
        kind[mask] = run

    def _check(self) -> None:
        if not self.trained:
            raise UserError(
                f"a report needs a run of a trained model; only untrained controls were given of {self.title}"
            )
        for run in self.runs:
            ours, first = run.metrics["probe"], self.first.metrics["probe"]
            for key in [key for key in ours if key in first and ours[key] != first[key]]:
                raise UserError(
                    f"{self.first.path} and {run.path} cannot be compared: their probes differ in {key}, "
                    f"{first[key]!r} and {ours[key]!r}; train both alike"
                )


def studies_of(paths: Iterable[str], longer: Iterable[str] = (), recipes: Iterable[str] = ()) -> list[Study]:
    """Reads finished runs and sorts them, studies in the order in which they come up.

    Args:
        paths: Folders of runs; NAME=FOLDER says of which model a run is where :func:`model_of` cannot know.
        longer: Of the same models, with longer-trained probes.
        recipes: Of the same models, with further recipes.

    Raises:
        UserError: A folder is no finished run, two runs take the same place, or they do not belong together.
    """
    studies: dict[tuple[str, str], Study] = {}
    for model, run in map(_named_run, paths):
        key = (model, run.metrics["dataset"])
        studies.setdefault(key, Study(*key))._add(run)
    first: dict[str, ProbeRun] = {}
    for study in studies.values():
        for run in study.runs:
            first.setdefault(study.dataset, run).check_same_images(run)
        study._check()
        study.trained = {mask: study.trained[mask] for mask in sorted(study.trained, key=_paper_order)}
    for kind, again in (("longer", longer), ("recipes", recipes)):
        for model, run in map(_named_run, again):
            key, mask = (model, run.metrics["dataset"]), run.metrics["image_attention"]
            if key not in studies or mask not in studies[key].trained:
                raise UserError(f"{run.path} is of {', '.join(key)} under {mask!r}, of which no main run is given")
            first[run.metrics["dataset"]].check_same_images(run)
            getattr(studies[key], kind)[mask] = run
    return list(studies.values())


def _named_run(path: str) -> tuple[str, ProbeRun]:
    name, separator, folder = str(path).partition("=")
    if separator and not Path(path).is_dir():
        return name, ProbeRun(folder)
    run = ProbeRun(path)
    return model_of(run), run


def model_of(run: ProbeRun) -> str:
    """What a model is called whatever its mask: encoder and LLM where it says of what it was made ("clip + vicuna-7b"),
    else the name of its checkpoint.
    """
    training = run.training
    if "encoder" in training and "llm" in training:
        return f"{training['encoder']['name']} + {Path(training['llm']).name}"
    return Path(run.metrics["mllm"]).name


def _paper_order(mask: str) -> int:
    return MASKS.index(mask) if mask in MASKS else len(MASKS)


def optional_tensors(run: ProbeRun, name: str) -> dict[str, Tensor]:
    path = run.path / name
    return read_tensors(path) if path.is_file() else {}


def answer_accuracy(run: ProbeRun) -> float | None:
    """Share of validation questions that the model answered right when its training ended, where it says so."""
    return run.training.get("val/answer_accuracy")


def overridden(study: Study) -> dict[str, str]:
    """The mask that a model was trained with, by the other one that a run put it under."""
    own = {mask: run.metrics.get("own_image_attention") for mask, run in study.trained.items()}
    return {mask: trained for mask, trained in own.items() if trained not in (None, mask)}


def total_seconds(timings: Path) -> float:
    """Wall time from a log of lines "start end step": the length of the union of its intervals."""
    spans = sorted(tuple(map(float, line.split()[:2])) for line in timings.read_text().splitlines() if line.strip())
    total, until = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
