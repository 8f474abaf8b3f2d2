"""Maps of other tasks than segmentation, against independent forwards."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from probes import FinishedRun
from probes.analyses.maps.section import shown_sites, site_rows
from probes.cli import main

TASKS = ("depth", "normals", "boundaries")


@pytest.mark.parametrize("task", TASKS)
def test_maps_equal_the_saved_predictions_and_are_drawn_beside_the_target(
    task, task_runs, tmp_path
):
    run = FinishedRun(shutil.copytree(task_runs[task].path, tmp_path / "run"))
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
    target = run.task.truth(torch.from_numpy(dataset[3]["target"])[None])[0].numpy()
    sites = shown_sites(run)
    predicted = [tensors["image/3"].numpy()[run.sites.index(site)] for site in sites]
    rows = {row.name: row.pictures for row in site_rows(run, sites)}
    np.testing.assert_array_equal(
        rows[dataset.names[3]][1:], run.task.colorize(np.stack([target, *predicted]))
    )
