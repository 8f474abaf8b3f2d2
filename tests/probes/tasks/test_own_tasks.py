"""Tasks of files of one's own: numbers by least squares, and classes by the loss, without segmentation beside them."""

import json
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import solving
from extensions import EXAMPLES, forgotten
from PIL import Image
from scipy.ndimage import distance_transform_edt

from llava_bidir.common.imports import take_imports
from probes import ProbeRun
from probes.cli import main
from probes.data.targets import find_boundaries

FILE = EXAMPLES / "task.py"
THINGS = """
import numpy as np
import probes

class Things(probes.Segmentation):
    name = "things"
    classes = ("stuff", "thing")
    channels = 2

    def read(self, target):
        return np.where(target == 255, 255, target > 1).astype(np.uint8)

probes.register_task(Things())
"""
COMMANDS = {"solve": solving.arguments, "fit": probe_runs.arguments}


@pytest.fixture
def own_task():
    """Import files of tasks, until the test ends."""
    with forgotten():
        yield lambda file: take_imports(["--import", str(file)])


def words_of(command: str, checkpoints: dict, root: Path, out: Path, task: str) -> list[str]:
    places = COMMANDS[command](checkpoints["causal"], root=root, out=out)
    return [*places, "--data.task", task, "--save_predictions", "true"]


def labels_of(run: ProbeRun) -> dict[str, np.ndarray]:
    """Return the masks of the validation images by name."""
    folder = Path(run.manifest["data"]["root"]) / "annotations/validation"
    return {file.stem: np.asarray(Image.open(file)) for file in folder.glob("*.png")}


def predicted(run: ProbeRun, site: str) -> dict[str, np.ndarray]:
    return {file.stem: np.load(file) for file in (run.path / "predictions" / site).glob("*.npy")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_regression_is_scored_as_numpy_scores_its_predictions(
    command, own_task, checkpoints, segmentation, tmp_path
):
    own_task(FILE)
    main(words_of(command, checkpoints, root=segmentation, out=tmp_path, task="distance"))
    run = ProbeRun(tmp_path)
    for site in run.metrics["sites"]:
        errors = []
        for name, prediction in predicted(run, site["site"]).items():
            mask = labels_of(run)[name]
            boundaries = find_boundaries(mask, mask == 255)
            error = np.abs(prediction - distance_transform_edt(boundaries != 1))
            errors.append(error[boundaries != 255].mean())
        assert site["mae"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert (run.strengths is not None and run.strengths.exact) == (command == "solve")


@pytest.mark.parametrize("command", COMMANDS)
def test_classes_of_ones_own_are_solved_and_trained_by_the_loss(
    command, own_task, checkpoints, segmentation, tmp_path
):
    file = tmp_path / "own_things.py"
    file.write_text(THINGS)
    own_task(file)
    main(words_of(command, checkpoints, root=segmentation, out=tmp_path / "run", task="things"))
    run = ProbeRun(tmp_path / "run")
    for site in run.metrics["sites"]:
        right = labelled = 0
        for name, prediction in predicted(run, site["site"]).items():
            mask = labels_of(run)[name]
            right += ((prediction == (mask > 1)) & (mask != 255)).sum()
            labelled += (mask != 255).sum()
        assert site["pacc"] == pytest.approx(right / labelled)
    assert run.dataset().classes == ["stuff", "thing"]
    file.write_text(THINGS.replace("> 1", "> 0"))
    with pytest.raises(ValueError, match="validation_task"):
        run.dataset()


def test_a_study_and_its_report_need_no_segmentation(own_task, checkpoints, segmentation, tmp_path):
    out = tmp_path / "study"
    words = ["study", str(checkpoints["causal"]), str(segmentation), "--out", str(out)]
    words += "-c configs/demo/probes.yaml --data.batch_size 2 --folds 2 --draws 0".split()
    main([*words, "--data.task", "distance", "--import", str(FILE)])
    results = json.loads((out / "report/results.json").read_text())
    own_task(FILE)
    run = ProbeRun(out / "trained")
    assert results["task"] == "distance" and run.task_name == "distance"
    best = min(site["mae"] for site in run.metrics["sites"])
    assert f"mean absolute error (px) {best:.3g}." in results["summary"][0]
    claims = {claim["claim"]: claim for claim in results["claims"]}
    assert claims["recovery"]["text"].endswith("mean absolute error (px)")
    page = (out / "report/index.html").read_text()
    assert "mIoU" not in page and "segment" not in page.replace("segmentation", "")
    assert f"{best:.3g}%" not in page and "lower is better" in page
