"""The runs of a report, sorted: under each mask the trained model and, as a control, the same one untrained."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..analyses.starvation import starvation
from ..results import ProbeRun, read_tensors

Rows = list[dict[str, Any]]  # of a table: by column

MASKS = ("causal", "bidirectional")


@dataclass
class Study:
    """What a report is made of.

    Args:
        trained, untrained: Runs by mask.
        longer: The trained models again, with longer-trained probes.
    """

    trained: dict[str, ProbeRun] = field(default_factory=dict)
    untrained: dict[str, ProbeRun] = field(default_factory=dict)
    longer: dict[str, ProbeRun] = field(default_factory=dict)

    @classmethod
    def of(cls, paths: list[str], longer: list[str] | None = None) -> "Study":
        """Reads finished runs.

        Raises:
            ValueError: A folder is no finished run, two runs take the same place, or they do not belong together.
        """
        study = cls()
        for path in paths:
            run = ProbeRun(path)
            kind = study.untrained if run.metrics["untrained"] else study.trained
            mask = run.metrics["image_attention"]
            if mask in kind:
                what = "untrained" if run.metrics["untrained"] else "trained"
                raise ValueError(f"{kind[mask].path} and {path} are both the {what} run under {mask!r}; give one")
            kind[mask] = run
        if not study.trained:
            raise ValueError("a report needs a run of a trained model; only untrained controls were given")
        first = next(iter(study.trained.values()))
        for run in study.runs:
            if run.manifest["data"]["fingerprint"] != first.manifest["data"]["fingerprint"]:
                raise ValueError(f"{first.path} and {run.path} were scored on different images")
        study.longer = {run.metrics["image_attention"]: run for run in map(ProbeRun, longer or [])}
        study.trained = {mask: study.trained[mask] for mask in sorted(study.trained, key=_paper_order)}
        return study

    @property
    def runs(self) -> list[ProbeRun]:
        return [*self.trained.values(), *self.untrained.values()]

    @property
    def first(self) -> ProbeRun:
        return next(iter(self.trained.values()))

    def starvation(self, untrained: bool = False) -> dict[str, Any] | None:
        """Accuracy by patch, causal against bidirectional; None unless there are both runs."""
        runs = self.untrained if untrained else self.trained
        return starvation(*(runs[mask] for mask in MASKS)) if set(MASKS) <= set(runs) else None


def _paper_order(mask: str) -> int:
    return MASKS.index(mask) if mask in MASKS else len(MASKS)


def optional_json(run: ProbeRun, name: str) -> dict[str, Any] | None:
    """A result that an analysis may have left in the run's folder."""
    path = run.path / name
    return json.loads(path.read_text()) if path.is_file() else None


def optional_tensors(run: ProbeRun, name: str) -> dict[str, Tensor]:
    path = run.path / name
    return read_tensors(path) if path.is_file() else {}


def answer_accuracy(run: ProbeRun) -> float | None:
    """Share of validation questions that the model answered right when its training ended, where it says so."""
    return (run.manifest["mllm_training"] or {}).get("val/answer_accuracy")


def total_seconds(timings: Path) -> float:
    """Wall time from a log of lines "start end step": the length of the union of its intervals."""
    spans = sorted(tuple(map(float, line.split()[:2])) for line in timings.read_text().splitlines() if line.strip())
    total, until = 0.0, 0.0
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
