"""Starvation of other tasks than segmentation: errors by position against loops, gaps against numpy, refusals."""

import json
import shutil

import numpy as np
import probe_runs
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_bidir.common.bootstrap import bootstrap_weights
from llava_bidir.common.errors import UserError
from probes import TaskRun
from probes.analyses.starvation.run import starvation
from probes.cli import main

GRID, SIZE = (2, 2), (24, 20)


def depth_error(prediction: float, target: float) -> float:
    return (np.log(prediction) - np.log(target)) ** 2


def normals_error(prediction: np.ndarray, target: np.ndarray) -> float:
    return np.degrees(np.arccos(np.clip(prediction @ target, -1, 1)))


def by_loop(run: TaskRun, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors and pixels by image and token, pixel by pixel from the saved predictions."""
    measure = {"depth": depth_error, "normals": normals_error}[run.task_name]
    dataset, tokens = run.dataset(), GRID[0] * GRID[1]
    error, valid = np.zeros((len(dataset), tokens)), np.zeros((len(dataset), tokens))
    for i, name in enumerate(dataset.names):
        prediction = np.load(run.path / "predictions" / site / f"{name}.npy").astype(np.float64)
        for y, x in np.ndindex(SIZE):
            target = dataset[i]["target"][y, x].astype(np.float64)
            if np.isfinite(target).all():
                token = (y * GRID[0] // SIZE[0]) * GRID[1] + x * GRID[1] // SIZE[1]
                error[i, token] += measure(prediction[y, x], target)
                valid[i, token] += 1
    return error, valid


@pytest.mark.parametrize("name", ["depth", "normals"])
def test_errors_by_position_equal_loops_over_pixels(name, task_runs):
    run = task_runs[name]
    errors, valid = run.patch_errors
    for i, site in enumerate(run.sites[:3]):
        expected = by_loop(run, site)
        np.testing.assert_allclose(errors[i].numpy(), expected[0], rtol=1e-3, atol=2e-2)
        np.testing.assert_array_equal(valid.numpy(), expected[1])
    assert (valid.sum(0) < len(run.dataset()) * 12 * 10).any(), "some pixels have no value"


def test_gaps_equal_numpy_and_are_positive_where_causal_is_worse(task_runs):
    causal, other = task_runs["depth"], task_runs["depth bidirectional"]
    results = starvation(causal, other, "layer_02", seed=3)
    weights = bootstrap_weights(causal.metrics["images"], seed=3).double().numpy()
    sums = [by_loop(run, "layer_02") for run in (causal, other)]
    mean = lambda w: [(w @ error) / (w @ valid) for error, valid in sums]
    (a, b), drawn = mean(np.ones(causal.metrics["images"])), mean(weights)
    np.testing.assert_allclose(results["causal"], a, rtol=1e-3)
    np.testing.assert_allclose(results["bidirectional"], b, rtol=1e-3)
    assert np.abs(a - b).max() > 0.01
    np.testing.assert_allclose(results["gap"], a - b, rtol=1e-2, atol=1e-4)
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(results["gap_ci95"], np.stack([2 * (a - b) - high, 2 * (a - b) - low], 1), atol=1e-3)
    row = [error[:, :2].sum() / valid[:, :2].sum() for error, valid in sums]
    assert results["first_row"]["gap"] == pytest.approx(row[0] - row[1], abs=1e-4)
    assert results["task"] == "depth" and results["error"] == "squared error of log depth"


def test_a_worse_causal_probe_is_a_positive_gap(task_runs, tmp_path):
    """The same run as both, with twice the errors at the first patch under the causal mask."""
    paths = [shutil.copytree(task_runs["depth"].path, tmp_path / mask) for mask in ("causal", "bidirectional")]
    tensors = load_file(paths[0] / "counts.safetensors")
    tensors["patch_error"][..., 0] *= 2
    save_file(tensors, paths[0] / "counts.safetensors")
    metrics = json.loads((paths[1] / "metrics.json").read_text()) | {"image_attention": "bidirectional"}
    (paths[1] / "metrics.json").write_text(json.dumps(metrics))
    for path in paths:
        probe_runs.record_hashes(path)
    gap = starvation(*map(TaskRun, paths))["gap"]
    assert gap[0] > 0 and gap[1:] == [0, 0, 0]


def test_command_writes_and_prints_errors(task_runs, tmp_path, capsys):
    runs = [str(task_runs[name].path) for name in ("depth", "depth bidirectional")]
    main(["starvation", "--probes", *runs, "--site", "layer_01", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "starvation.json").read_text())
    assert results == starvation(*map(TaskRun, runs), "layer_01")
    out = capsys.readouterr().out
    assert (
        "squared error of log depth at layer_01" in out
        and f"first row: causal {results['first_row']['causal']:.3g}" in out
    )


@pytest.mark.parametrize("option", [["--by-class"], ["--flip", "horizontal"], ["--own-probe"], ["--dummy-tokens", "2"]])
def test_what_is_for_segmentation_names_the_task(option, task_runs):
    runs = [str(task_runs[name].path) for name in ("depth", "depth bidirectional")]
    with pytest.raises(SystemExit, match=f"probes of the task depth, but {option[0]} of `probes starvation` are for"):
        main(["starvation", "--probes", *runs, *option])


def test_tasks_are_not_mixed_and_boundaries_have_none(task_runs, runs):
    with pytest.raises(UserError, match="is a run of depth, .* of segmentation; compare runs of the same task"):
        starvation(task_runs["depth"], runs["bidirectional"])
    with pytest.raises(
        UserError, match="is a run of boundaries, where a pixel has no error of its own.*depth, normals"
    ):
        _ = task_runs["boundaries"].patch_errors
    assert not task_runs["boundaries"].has_patch_errors


@pytest.mark.parametrize("damage", ["missing", "negative", "shape"])
def test_damaged_errors_are_named(damage, task_runs, tmp_path):
    path = shutil.copytree(task_runs["depth"].path, tmp_path / "run")
    tensors = load_file(path / "counts.safetensors")
    if damage == "missing":
        del tensors["patch_error"]
    if damage == "negative":
        tensors["patch_error"][0, 0, 0] = -1
    if damage == "shape":
        tensors["patch_valid"] = torch.ones(3)
    save_file(tensors, path / "counts.safetensors")
    probe_runs.record_hashes(path)
    message = (
        "made before errors by position were kept" if damage == "missing" else "counts.safetensors: patch_error and"
    )
    with pytest.raises(UserError, match=message):
        _ = TaskRun(path).patch_errors
