"""Validation data that have changed since a run was scored on them."""

import json
import shutil

import numpy as np
import probe_runs
import pytest
import tiny_models
from PIL import Image

from probes.cli import main
from probes.runs.read import ProbeRun, warn_of_changed_data

MASKS = ("causal", "bidirectional")


@pytest.fixture(scope="module")
def study(checkpoints, tmp_path_factory):
    """A folder with two runs, and their data elsewhere: the folder and the data."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"))
    folder = tmp_path_factory.mktemp("runs")
    for mask in MASKS:
        probe_runs.fit(checkpoints[mask], root, folder / mask)
    return folder, root


def test_a_report_warns_of_changed_masks(study, tmp_path, caplog):
    folder, root = study
    warn_of_changed_data([ProbeRun(folder / mask) for mask in MASKS])
    assert "former data" not in caplog.text
    file = root / "annotations/validation/000.png"
    before = file.read_bytes()
    try:
        Image.fromarray(1 - np.asarray(Image.open(file)).clip(0, 1)).save(file)
        main(["report", str(folder), "--out", str(tmp_path / "out")])
    finally:
        file.write_bytes(before)
    assert "belongs to a run with data.validation_masks='5, sha256" in caplog.text
    assert "Its scores are those on the former data" in caplog.text


def test_a_report_works_without_the_data(study, tmp_path, caplog):
    runs = [shutil.copytree(study[0] / mask, tmp_path / mask) for mask in MASKS]
    for run in runs:
        manifest = json.loads((run / "manifest.json").read_text())
        manifest["data"]["root"] = str(tmp_path / "none")
        (run / "manifest.json").write_text(json.dumps(manifest))
    main(["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "former data" not in caplog.text
