"""Studies whose steps write files in place of solving anything."""

import json

import pytest
from studies import study_of

from probes.steps import Step
from probes.studies import run
from probes.studies.config import StudyConfig


@pytest.fixture
def settings(checkpoints, segmentation, tmp_path):
    """Return a function that makes the settings of a study of models by label and mask."""

    def make(models: dict[str, str], **more) -> StudyConfig:
        paths = {label: str(checkpoints[mask]) for label, mask in models.items()}
        return study_of(
            paths,
            str(segmentation),
            tmp_path / "study",
            **{"draws": 1, **more},
        )

    return make


@pytest.fixture
def ran(monkeypatch):
    """Replace the commands of steps by files with their results; return the names of steps that ran.

    `ran.failing` says which step raises which error.
    """

    class Ran(list):
        failing: dict[str, Exception] = {}

    names = Ran()
    names.failing = {}

    def run_step(study: StudyConfig, step: Step) -> None:
        names.append(step.name)
        if step.name in names.failing:
            raise names.failing[step.name]
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.write_text(json.dumps({"classes": [{"class": "sky"}], "summary": []}))

    monkeypatch.setattr(run, "_run_step", run_step)
    monkeypatch.setattr(run, "write_table", lambda out, labels: (out / "table.csv").touch())
    monkeypatch.setattr(run, "print_summary", lambda *_: None)
    return names
