"""The report's section on other tasks: effects against numpy, controls, the path, and what it shows."""

import json

import numpy as np
import probe_runs
import pytest
import torch
from safetensors.torch import save_file

from llava_bidir.common.bootstrap import bootstrap_weights
from probes import TaskRun
from probes.cli import main
from probes.models.sites import site_names
from probes.report.beyond_classes import effects, task_results
from probes.report.figures.beyond_classes import relative_scores
from probes.tasks import TASKS
from probes.training.write_run import task_summary

IMAGES, STRENGTHS = 40, [1e-3, 1e-1, 1.0]


def write_task_run(path, rmse: list[float], root, mask: str = "causal", untrained: bool = False, seed: int = 0):
    """Write a depth run whose encoder, adapter, layers and final norm have the mean RMSE `rmse`; 2 at strength 1."""
    probe_runs.write_run(path, [0.5] * len(rmse), root=root, mask=mask, untrained=untrained, images=IMAGES)
    sites, task = site_names(len(rmse) - 3), TASKS["depth"]
    noise = torch.rand(len(rmse), IMAGES, 6, generator=torch.Generator().manual_seed(seed)) * 0.1
    sums = torch.cat([torch.ones(len(rmse), IMAGES, 1), noise], -1)
    sums[..., 1] += torch.tensor(rmse)[:, None] - 0.05
    along = torch.stack([sums, sums, sums])
    along[-1, ..., 1] = 2
    scores = {name: x.tolist() for name, x in task.dataset_scores(sums.double().sum(1)).items()}
    metrics = json.loads((path / "metrics.json").read_text())
    for key in ("classes", "baseline"):
        del metrics[key]
    metrics |= {"task": "depth", "scores": {k: "higher" if up else "lower" for k, up in task.scores.items()}}
    metrics["sites"] = [
        {"site": site, "dim": 8, "best_epoch": None, "history": []}
        | {name: scores[name][i] for name in scores}
        | {f"{name}_ci95": [scores[name][i] - 0.01, scores[name][i] + 0.01] for name in scores}
        for i, site in enumerate(sites)
    ]
    metrics["summary"] = task_summary(dict(zip(sites, scores["rmse"], strict=True)), task.sign)
    entries = [{"site": site, "cv_loss": [1.0, 2.0, 3.0], "chosen": 1e-3} for site in sites]
    metrics["path"] = {"passes": 1, "sample_images": 0, "closed_form": {"strengths": STRENGTHS, "sites": entries}}
    (path / "metrics.json").write_text(json.dumps(metrics))
    save_file({"sums": sums}, path / "counts.safetensors")
    save_file({"closed_form/sums": along}, path / "path.safetensors")
    return path


@pytest.fixture
def folders(segmentation, tmp_path) -> dict[str, str]:
    trained = write_task_run(tmp_path / "depth", [0.5, 0.8, 0.7, 0.55, 0.56], segmentation)
    control = write_task_run(tmp_path / "random", [0.5, 1.0, 1.1, 0.95, 0.96], segmentation, untrained=True, seed=1)
    classes = probe_runs.write_run(tmp_path / "classes", [0.8, 0.6, 0.7, 0.75, 0.74], root=segmentation)
    return {"depth": str(trained), "random": str(control), "classes": str(classes)}


def test_drop_and_recovery_equal_numpy_on_the_sums(folders):
    """Lower is better, so that drop and recovery are positive where RMSE rises and falls."""
    run = TaskRun(folders["depth"])
    ours, rmse = effects(run, run.sums), run.sums[..., 1].double().numpy()
    weights = bootstrap_weights(IMAGES).double().numpy()
    best = 3 if "layer_02" == run.sites[3] else None
    for name, (a, b) in {"adapter_drop": (1, 0), "recovery": (1, best)}.items():
        value, resampled = ours[name]
        assert value == pytest.approx(rmse[a].mean() - rmse[b].mean()) and value > 0
        expected = weights @ (rmse[a] - rmse[b]) / weights.sum(1)
        np.testing.assert_allclose(resampled.numpy(), expected, rtol=1e-6)


def test_control_and_path(folders):
    (entry,) = task_results([TaskRun(folders["depth"]), TaskRun(folders["random"])])
    control = effects(TaskRun(folders["random"]), TaskRun(folders["random"]).sums)["recovery"][0]
    assert entry["recovery_beyond_control"]["value"] == pytest.approx(entry["recovery"]["value"] - control)
    assert [row["strength"] for row in entry["path"]] == STRENGTHS
    assert entry["path"][0]["recovery"] == entry["recovery"] and entry["path"][-1]["recovery"]["value"] == 0


def test_scores_are_in_units_of_the_encoders(folders):
    (entry,) = task_results([TaskRun(folders["depth"])])
    rows = relative_scores(entry, "sites")
    assert rows[0]["relative"] == 1 and rows[1]["relative"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert all(low <= row["relative"] <= high for row in rows for low, high in [row["ci95"]])
    assert relative_scores(entry, "control") == []


def test_report_has_the_section_only_with_runs_of_tasks(folders, tmp_path):
    main(["report", folders["classes"], "--out", str(tmp_path / "without")])
    assert "Beyond classes" not in (tmp_path / "without/index.html").read_text()
    assert "tasks" not in json.loads((tmp_path / "without/results.json").read_text())
    out = tmp_path / "with"
    main(["report", folders["classes"], "--out", str(out), "--tasks", folders["depth"], folders["random"]])
    page = (out / "index.html").read_text()
    assert "Beyond classes" in page and "Exploratory" in page and "RMSE (m), lower is better" in page
    assert json.loads((out / "results.json").read_text())["tasks"][0]["task"] == "depth"
    assert {"tasks.png", "tasks.pdf", "tasks.csv", "tasks_table.csv"} <= {file.name for file in out.iterdir()}


@pytest.mark.parametrize(
    ("runs", "message"), [(["depth", "depth"], "pass one of them"), (["classes"], "is a run of segmentation")]
)
def test_rejects_runs_that_do_not_fit(runs, message, folders, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["report", folders["classes"], "--out", str(tmp_path / "r"), "--tasks", *(folders[run] for run in runs)])


def test_damaged_sums_are_named(folders):
    save_file({"sums": torch.ones(2, 3)}, f"{folders['depth']}/counts.safetensors")
    with pytest.raises(ValueError, match="counts.safetensors: sums is"):
        _ = TaskRun(folders["depth"]).sums
