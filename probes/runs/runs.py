"""Find and open the finished runs of a folder."""

import re
from pathlib import Path

from probes.tasks import SEGMENTATION

from .finished_run import FinishedRun
from .probe_run import ProbeRun


def finished_runs(folder: str | Path) -> list[Path]:
    """Return the folders of all finished runs, trained models first, draws in order."""
    folder = Path(folder)
    found = {
        file.parent
        for pattern in ("*", "*/*", "*/*/*")
        for file in folder.glob(f"{pattern}/metrics.json")
    }

    def number(part):
        return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", part)]

    def key(run):
        return (
            not run.name.startswith(("trained", "probes")),
            *map(number, run.relative_to(folder).parts),
        )

    return sorted(found, key=key)


def open_run(path: str | Path, trust: bool = False) -> FinishedRun:
    """Return a finished run of any task; of segmentation, a :class:`ProbeRun`.

    Raises:
        UserError: If `path` is not a finished run.
    """
    run = FinishedRun(path, trust=trust)
    return ProbeRun(path, trust=trust) if run.task_name == SEGMENTATION else run
