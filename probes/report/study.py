"""Group the runs of a report by model and dataset, then by attention mask, trained and untrained."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_bidir.common.errors import UserError
from probes.analyses.starvation.run import starvation
from probes.results.probe_run import ProbeRun

Rows = list[dict[str, Any]]  # rows of a table, each a dict of its columns

MASKS = ("causal", "bidirectional")


@dataclass
class Study:
    """One model on one dataset; all runs by mask."""

    model: str
    dataset: str
    trained: dict[str, ProbeRun] = field(default_factory=dict)
    untrained: dict[str, ProbeRun] = field(default_factory=dict)
    long_runs: dict[str, ProbeRun] = field(default_factory=dict)  # trained model, longer-trained probes
    variant_runs: dict[str, ProbeRun] = field(default_factory=dict)  # probe variants, unless `trained` has them

    @property
    def runs(self) -> list[ProbeRun]:
        """Trained and untrained runs."""
        return [*self.trained.values(), *self.untrained.values()]

    @property
    def first(self) -> ProbeRun:
        """The first trained run, whose dataset and settings stand for the study."""
        return next(iter(self.trained.values()))

    @property
    def runs_with_variants(self) -> dict[str, ProbeRun]:
        """The runs whose probe variants are compared, by mask."""
        return {mask: self.variant_runs.get(mask, run) for mask, run in self.trained.items()}

    @property
    def title(self) -> str:
        """Heading of the study on the page."""
        return f"{self.model}, {self.dataset}"

    @property
    def slug(self) -> str:
        """Folder name of the study."""
        return "".join(c if c.isalnum() or c in ".-" else "_" for c in f"{self.model}_{self.dataset}")

    def pair(self, untrained: bool = False) -> tuple[ProbeRun, ProbeRun] | None:
        """Return the causal and the bidirectional run; None unless both exist."""
        runs = self.untrained if untrained else self.trained
        return (runs[MASKS[0]], runs[MASKS[1]]) if set(MASKS) <= set(runs) else None

    def starvation(self, untrained: bool = False) -> dict[str, Any] | None:
        """Return the accuracy per patch under both masks; None unless both runs exist."""
        pair = self.pair(untrained)
        return starvation(*pair) if pair else None

    def _add(self, run: ProbeRun) -> None:
        kind, mask = "untrained" if run.metrics["untrained"] else "trained", run.metrics["image_attention"]
        runs = getattr(self, kind)
        if mask in runs:
            raise UserError(
                f"{runs[mask].path} and {run.path} are both the {kind} run under {mask!r} of {self.title}; "
                f"pass only one, or name the model of each: NAME={run.path}"
            )
        runs[mask] = run

    def _check(self) -> None:
        if not self.trained:
            raise UserError(f"only untrained controls were passed for {self.title}; add a run of the trained model")
        for run in self.runs:
            settings, expected = run.metrics["probe"], self.first.metrics["probe"]
            for key in [key for key in settings if key in expected and settings[key] != expected[key]]:
                raise UserError(
                    f"{self.first.path} and {run.path} cannot be compared: their probes differ in {key}, "
                    f"{expected[key]!r} and {settings[key]!r}; train both with the same settings"
                )


def read_studies(paths: Iterable[str], long_runs: Iterable[str] = (), variants: Iterable[str] = ()) -> list[Study]:
    """Read finished runs and group them into studies, in the order in which these first appear.

    Args:
        paths: Run folders; NAME=FOLDER names the model if :func:`model_name` cannot tell.
        long_runs, variants: Runs of the same models with longer-trained probes, and with probe variants.

    Raises:
        UserError: A folder is not a finished run, two runs are the same case, or runs do not fit together.
    """
    studies: dict[tuple[str, str], Study] = {}
    for model, run in map(_read_run, paths):
        key = (model, run.metrics["dataset"])
        studies.setdefault(key, Study(*key))._add(run)
    reference: dict[str, ProbeRun] = {}  # by dataset: the run whose images all others must share
    for study in studies.values():
        for run in study.runs:
            reference.setdefault(study.dataset, run).check_same_images(run)
        study._check()
        masks = dict.fromkeys((*MASKS, *study.trained))  # the paper's first
        study.trained = {mask: study.trained[mask] for mask in masks if mask in study.trained}
    for field_name, extra_paths in (("long_runs", long_runs), ("variant_runs", variants)):
        for model, run in map(_read_run, extra_paths):
            key, mask = (model, run.metrics["dataset"]), run.metrics["image_attention"]
            if key not in studies or mask not in studies[key].trained:
                raise UserError(f"no main run matches {run.path} ({', '.join(key)}, {mask!r}); pass that run too")
            reference[run.metrics["dataset"]].check_same_images(run)
            getattr(studies[key], field_name)[mask] = run
    return list(studies.values())


def _read_run(path: str) -> tuple[str, ProbeRun]:
    name, separator, folder = str(path).partition("=")
    if separator and not Path(path).is_dir():
        return name, ProbeRun(folder)
    run = ProbeRun(path)
    return model_name(run), run


def model_name(run: ProbeRun) -> str:
    """Return encoder and LLM ("clip + vicuna-7b") if the checkpoint states them, else the checkpoint's name."""
    training = run.training
    if "encoder" in training and "llm" in training:
        return f"{training['encoder']['name']} + {Path(training['llm']).name}"
    return Path(run.metrics["mllm"]).name


def overridden_masks(study: Study) -> dict[str, str]:
    """Return, per mask of a run, the different mask that its model was trained with."""
    trained_with = {mask: run.metrics.get("own_image_attention") for mask, run in study.trained.items()}
    return {mask: own for mask, own in trained_with.items() if own not in (None, mask)}


def total_wall_s(timings: Path) -> float:
    """Return the wall time of a log of lines "start end step": the length of the union of its intervals."""
    intervals = sorted(tuple(map(float, line.split()[:2])) for line in timings.read_text().splitlines() if line.strip())
    total, until = 0.0, 0.0
    for start, end in intervals:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
