"""A patch that is never labelled, such as the padding of landscape photos, has no accuracy and no claim."""

import json
import math
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import tiny_models
from PIL import Image

from probes.cli import main


@pytest.fixture(scope="module")
def runs(checkpoints, tmp_path_factory) -> list[str]:
    """A causal and a bidirectional run on images whose upper left quarter is never labelled: patch 0 of 2 x 2."""
    root = tiny_models.write_segmentation(
        tmp_path_factory.mktemp("data"),
        training=4,
        validation=9,
        seed=5,
    )
    for file in root.glob("annotations/*/*.png"):
        mask = np.array(Image.open(file))
        mask[: mask.shape[0] // 2, : mask.shape[1] // 2] = 255
        Image.fromarray(mask).save(file)
    masks = ("causal", "bidirectional")
    folder = tmp_path_factory.mktemp("study")
    return [str(probe_runs.fit(checkpoints[mask], root, folder / mask).path) for mask in masks]


def read_strictly(path: Path) -> dict:
    """Return the content of a file that readers of other languages can parse, too: JSON has no NaN."""

    def refuse(constant: str):
        raise AssertionError(f"{path} has {constant}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_it_has_no_accuracy(runs, tmp_path, capsys):
    main(["report", str(Path(runs[0]).parent), "--out", str(tmp_path)])
    results = read_strictly(tmp_path / "results.json")
    result = results["starvation"]
    for patches in (result, result["by_class"]):
        assert patches["gap"][0] is None
        assert patches["gap_ci95"][0] == [None, None]
        assert all(math.isfinite(gap) for gap in patches["gap"][1:])

    claims = {entry["claim"] for entry in results["claims"]}
    assert claims & {"starvation", "starvation_first_row"} == {"starvation_first_row"}
    assert "nan" not in capsys.readouterr().out
    assert ">nan" not in (tmp_path / "index.html").read_text()
