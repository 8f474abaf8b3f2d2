"""The command that makes a run with the settings of another one, for advice that a reader can follow as it stands."""

import json
from collections.abc import Mapping
from shlex import quote
from typing import Any

from llava_bidir.common.configs import config_names
from probes.tasks import SEGMENTATION
from probes.training.run_schema import MODEL_SETTINGS

from .finished_run import FinishedRun

SOLVER_OPTIONS = ("folds", "passes", "sample_images", "strengths")


def format_command(run: FinishedRun, command: str, changes: Mapping[str, Any]) -> str:
    """Return `probes COMMAND ... --out RUN` with the settings of a run, quoted for a shell.

    Args:
        run: Its model, data and, of solved probes, the solver's options are those of the command.
        command: "solve", or "fit", which has the recipe of the run's data set.
        changes: Values of other settings, by names as in "model.draw", or of the solver's options.
    """
    solver = {name: run.manifest["config"].get(name) for name in SOLVER_OPTIONS}
    solver |= {name: value for name, value in changes.items() if name in SOLVER_OPTIONS}
    chosen = _settings(run) | {k: x for k, x in changes.items() if k not in SOLVER_OPTIONS}
    settings = {k: x for k, x in chosen.items() if x not in (None, [], {})}
    if not settings.get("model.untrained"):  # nothing is drawn
        settings = {k: x for k, x in settings.items() if k not in ("model.match", "model.draw")}
    words = ["probes", command]
    if command == "fit":
        layout = run.manifest["data"]["dataset"]
        words += ["-c", layout if layout in config_names() else "folder"]
    for name, value in settings.items():
        words += [f"--{name}", _word(value)]
    if command == "solve":
        for name, value in solver.items():
            if value:
                values = value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(map(quote, [*words, "--out", "RUN"]))


def _settings(run: FinishedRun) -> dict[str, Any]:
    """Return the settings that decide whether runs can be compared, by name."""
    config = run.manifest["config"]
    data = run.manifest["data"]
    recorded = run.manifest["identity"]["settings"]
    # that of classes is linked from the data, and both seeds from seed_everything
    own = {f"model.{name}": config.get(name) for name in MODEL_SETTINGS if name != "num_classes"}
    own |= {"model.mllm": config.get("mllm", run.metrics["mllm"]), "model.seed": None}
    return own | {
        "seed_everything": str(run.metrics["seed"]),
        "data.root": data["root"],
        "data.dataset": data["dataset"],
        "data.task": None if run.task_name == SEGMENTATION else run.task_name,
        "data.options": data["options"],
        "data.name": run.metrics["dataset"],
        "data.batch_size": recorded.get("data.batch_size"),
    }


def _word(value: Any) -> str:
    if isinstance(value, list):  # of names
        return f"[{', '.join(value)}]"
    return value if isinstance(value, str) else json.dumps(value)
