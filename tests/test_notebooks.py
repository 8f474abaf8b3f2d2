"""The notebooks: committed with outputs, and every cell runs on the demo's model."""

import os
import re
import shutil
from pathlib import Path

import pytest
from processes import HANGING_S

nbformat = pytest.importorskip("nbformat", reason="nbformat (extra: test) is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("llava_bidir", "probes")
    for path in (ROOT / folder).rglob("*.ipynb")
)
MAX_BYTES = 300_000


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_with_outputs_of_one_run_and_nothing_of_the_machine(name):
    text = (ROOT / name).read_text()
    cells = nbformat.reads(text, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum(bool(cell.outputs) for cell in code) > len(code) / 2
    assert "error" not in {output.output_type for cell in code for output in cell.outputs}
    assert "image/png" in text
    assert len(text.encode()) < MAX_BYTES
    assert not re.findall(r"(?:/home|/root|/tmp|/work|/Users|site-packages)/\S+", text)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs(name, demo, tmp_path, monkeypatch):
    """In a copy of the folder, which has nothing but a demo above it."""
    client = pytest.importorskip("nbclient", reason="nbclient (extra: test) is not installed")
    folder = tmp_path / Path(name).parent
    folder.mkdir(parents=True)
    shutil.copytree(demo, tmp_path / "runs/demo")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    notebook = nbformat.read(ROOT / name, 4)
    client.NotebookClient(
        notebook, timeout=HANGING_S, resources={"metadata": {"path": str(folder)}}
    ).execute()
