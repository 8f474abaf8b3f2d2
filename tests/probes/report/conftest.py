"""Studies of random counts that the tests of the report write."""

import json
import shutil
from pathlib import Path

import knockouts
import probe_runs
import pytest


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A data folder of which the classes alone are known."""
    folder = tmp_path_factory.mktemp("classes")
    (folder / "classes.json").write_text(json.dumps({"classes": knockouts.CLASSES}))
    return folder


@pytest.fixture(scope="session")
def written() -> dict[str, Path]:
    """Runs that a test has asked for, by what they are."""
    return {}


@pytest.fixture
def write(root, written, tmp_path, tmp_path_factory):
    """Return a function that writes a run, of which the test can change the files."""

    def write(
        name, quality, number=0, *, mask="causal", solved=False, options=None, **metrics
    ) -> str:
        options = (options or {}) | {"mask": mask, "seed": number, "metrics": metrics}
        kind = repr((quality, solved, options))
        if kind not in written:
            written[kind] = tmp_path_factory.mktemp("written") / "run"
            make = probe_runs.write_solved if solved else probe_runs.write_run
            make(written[kind], quality, root=root, **options)
        return str(shutil.copytree(written[kind], tmp_path / f"{mask}_{name}"))

    return write


@pytest.fixture
def draws(write):
    """Write random and permuted LLMs, solved, one of both for each curve; with step 0 they have equal counts."""

    def draws(
        *curves, mask="causal", first=20, step=1, matches=("update", "permuted"), **more
    ) -> list[str]:
        return [
            write(
                f"{match}{i}_{first}",
                curve,
                first + step * i,
                mask=mask,
                solved=True,
                match=match,
                draw=i,
                **{"untrained": ["llm"], **more},
            )
            for match in matches
            for i, curve in enumerate(curves)
        ]

    return draws
