"""Studies whose steps write files in place of solving anything."""

import json

import pytest
from studies import study_of

from probes.config import StudyOptions
from probes.steps.record import Step
from probes.studies import run


@pytest.fixture
def settings(checkpoints, segmentation, tmp_path):
    """Return a function that makes the settings of a study of a causal model, or of models by label and mask."""

    def make(models: dict[str, str] | None = None, **more) -> StudyOptions:
        paths = {label: checkpoints[mask] for label, mask in (models or {"": "causal"}).items()}
        return study_of(paths, data=segmentation, out=tmp_path / "study", **{"draws": 1, **more})

    return make


class Ran(list):
    """The names of the steps that have run; `failing` says which step raises which error."""

    def __init__(self):
        super().__init__()
        self.failing: dict[str, Exception] = {}

    def run_step(self, study: StudyOptions, step: Step) -> None:
        """Write a result as the command of a step does."""
        self.append(step.name)
        if step.name in self.failing:
            raise self.failing[step.name]
        step.result.parent.mkdir(parents=True, exist_ok=True)
        step.result.write_text(json.dumps({"classes": [{"class": "sky"}], "summary": []}))

    def of(self, study: StudyOptions) -> list[str]:
        """Run a study, and return the names of its steps that ran this time."""
        self.clear()
        run.run_study(study)
        return [*self]


@pytest.fixture
def ran(monkeypatch) -> Ran:
    """Replace the commands of steps by files with their results."""
    ran = Ran()
    monkeypatch.setattr(run, "_run_step", ran.run_step)
    monkeypatch.setattr(run, "write_table", lambda out, labels: (out / "table.csv").touch())
    monkeypatch.setattr(run, "print_summary", lambda *_, **__: None)
    return ran
