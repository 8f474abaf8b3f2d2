"""Runs of other tasks than segmentation, and small squares of families, that tests share."""

from pathlib import Path

import pytest
import task_runs as helper
import tiny_families

from probes import FinishedRun
from probes.cli import main
from probes.models.families import dynamic_resolution, gemma


@pytest.fixture(scope="module")
def small_squares():
    """Families that take images of any size are given fewer tokens, for time; modules ask for it by `usefixtures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_resolution, "TOKENS_PER_SIDE", tiny_families.SIDE)
        patch.setattr(gemma, "GEMMA4_TOKENS_PER_SIDE", tiny_families.SIDE)
        yield


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
        more = ["--strengths", "1e-2"] * bool(mask)  # another probe, so that there is a gap
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
