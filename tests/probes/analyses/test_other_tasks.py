"""Maps of other tasks than segmentation, against independent forwards."""

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from probes import ProbeRun
from probes.cli import main

TASKS = ("depth", "normals", "boundaries")


@pytest.mark.parametrize("task", TASKS)
def test_maps_equal_the_saved_predictions(task, task_runs, tmp_path):
    run = ProbeRun(shutil.copytree(task_runs[task].path, tmp_path / "run"))
    main(["maps", "--probes", str(run.path), "--image", "1", "3"])
    tensors = load_file(run.path / "maps.safetensors")
    index = run.analysis("maps.json")
    dataset = run.dataset()
    assert index["sites"] == run.sites
    assert index["knockout"] == []
    for image in index["images"]:
        name = dataset.names[image["index"]]
        saved = np.stack(
            [np.load(run.path / "predictions" / site / f"{name}.npy") for site in run.sites]
        )
        np.testing.assert_allclose(
            tensors[f"image/{image['index']}"].numpy(), saved, atol=2e-3, rtol=2e-3
        )
