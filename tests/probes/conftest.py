"""Runs of other tasks than segmentation that tests share."""

from pathlib import Path

import pytest
import task_runs as helper

from probes import FinishedRun
from probes.cli import main


@pytest.fixture(scope="session")
def task_root(segmentation, tmp_path_factory) -> Path:
    return helper.write_targets(segmentation, tmp_path_factory.mktemp("targets") / "data")


@pytest.fixture(scope="session")
def task_runs(checkpoints, task_root, tmp_path_factory) -> dict[str, FinishedRun]:
    """Solved runs of every task under a causal mask, and of depth under a bidirectional one at another strength."""
    runs = {}
    for name in ("depth", "normals", "boundaries", "depth bidirectional"):
        task, _, mask = name.partition(" ")
        out = tmp_path_factory.mktemp(name.replace(" ", "_"))
        more = ["--passes", "1"] + ["--strengths", "1e-2"] * bool(
            mask
        )  # another probe, so that there is a gap
        main(
            helper.arguments(
                "solve",
                task,
                checkpoints[mask or "causal"],
                task_root,
                out,
                *more,
            )
        )
        runs[name] = FinishedRun(out)
    return runs
