"""What tests of probes share: reports without pictures, small squares of families, runs of other tasks."""

from pathlib import Path

import pytest
import task_runs as helper
import tiny_families
from matplotlib.figure import Figure as Drawing

from probes import ProbeRun
from probes.cli import main
from probes.models.families import dynamic_resolution, gemma


@pytest.fixture(scope="module", autouse=True)
def no_pictures(request):
    """Save a few bytes for each figure: drawing them is most of a report's time.

    Modules with `DRAWS_PICTURES` look at the pictures.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not getattr(request.module, "DRAWS_PICTURES", False):
            patch.setattr(Drawing, "savefig", lambda self, file, **options: file.write(b"%PDF"))
        yield


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
def task_runs(checkpoints, task_root, tmp_path_factory) -> dict[str, ProbeRun]:
    """Solved runs of every task under a causal mask, and of depth under a bidirectional one at another strength."""
    runs = {}
    for name in ("depth", "normals", "boundaries", "depth bidirectional"):
        task, _, mask = name.partition(" ")
        out = tmp_path_factory.mktemp(name.replace(" ", "_"))
        more = ["--strengths", "1e-2"] * bool(mask)  # another probe, so that there is a gap
        main(helper.arguments("solve", task, checkpoints[mask or "causal"], task_root, out, *more))
        runs[name] = ProbeRun(out)
    return runs
