"""Position alone in a study: for each task and grid, in the figure, a row of sites, and results.json."""

import json
import re
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import tiny_encoders
import tiny_models
from studies import study_of

from probes.runs.files import read_tensors
from probes.runs.read import ProbeRun
from probes.studies.run import run_study

OPTIONS = (
    "--data.batch_size 8 --trainer.accelerator cpu --model.image_px 32 --folds 2 --strengths 1e-1"
).split()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return the folder of a study of a bare encoder, and what its report says."""
    root = tmp_path_factory.mktemp("position")
    data = tiny_models.write_segmentation(root / "data", 8, 12, size=(32, 32))
    models = {"": tiny_encoders.STOCK["dinov2"].write(root / "dinov2")}
    settings = {"arms": ("trained",), "only": ("solve", "position", "report")}
    with redirect_stdout(StringIO()):
        run_study(study_of(models, data, root / "out", OPTIONS, tasks=("boundaries",), **settings))
    return root / "out", json.loads((root / "out/report/results.json").read_text())


def test_results_have_its_scores_by_task_data_set_and_grid(study):
    out, results = study
    for task, name, score in (
        ("segmentation", "trained", "miou"),
        ("boundaries", "boundaries_trained", "f"),
    ):
        run = ProbeRun(out / name)
        rows, columns = run.metrics["grid"]
        entry = results["position"][task]["data"][f"{rows}x{columns}"]
        measured = json.loads((out / name / "position.json").read_text())
        assert entry[score] == measured["scores"][score]
        (of_model,) = entry["models"]
        best = max(run.metrics["sites"], key=lambda site: site[score])
        assert of_model["best"] == best[score] and of_model["site"] == best["site"]
        assert of_model["share"] == pytest.approx(entry[score] / best[score])


def test_its_score_is_that_of_its_one_map_on_the_masks(study):
    out, _ = study
    run = ProbeRun(out / "trained")
    output = read_tensors(run.path / "position.safetensors")["output"]
    right = predicted = labelled = 0
    for sample in run.dataset():
        target = sample["target"]
        size = target.shape
        guess = run.task.predict_pixels(output, size, run.mllm().geometry.view(size))
        classes = range(len(run.metrics["classes"]))
        valid = target != 255
        right = right + np.array([(valid & (guess == k) & (target == k)).sum() for k in classes])
        predicted = predicted + np.array([(valid & (guess == k)).sum() for k in classes])
        labelled = labelled + np.array([(target == k).sum() for k in classes])
    iou = right / (predicted + labelled - right)
    measured = json.loads((run.path / "position.json").read_text())["scores"]["miou"]
    assert measured == pytest.approx(iou.mean())


def test_the_page_has_a_dashed_line_and_a_row(study):
    out, results = study
    page = (out / "report/index.html").read_text()
    entry = next(iter(results["position"]["segmentation"]["data"].values()))
    assert '<th scope="row">position alone</th>' in page
    assert f"{100 * entry['miou']:.1f}" in page
    assert re.search(r'class="grey">\s*<path class="line dashed"', page)
    assert f"{100 * entry['models'][0]['share']:.0f}% of the best score" in page
