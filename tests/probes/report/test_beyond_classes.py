"""The report's section on other tasks: effects against numpy, controls, the path, and what it shows."""

import json

import numpy as np
import probe_runs
import pytest
import torch
from safetensors.torch import save_file
from task_runs import DEPTH_IMAGES, write_depth_run

from llava_bidir.common.bootstrap import bootstrap_weights
from probes import FinishedRun
from probes.cli import main
from probes.report.beyond_classes import (
    encoder_task_table,
    read_task_runs,
    task_results,
    task_table,
)
from probes.report.figures.beyond_classes import relative_scores, task_figures, tasks_by_site

RMSE = [0.5, 0.8, 0.7, 0.55, 0.56]
LAYERS = ["layer_00", "layer_01", "layer_02", "layer_03", "final_norm"]


@pytest.fixture
def folders(segmentation, tmp_path) -> dict[str, str]:
    trained = write_depth_run(tmp_path / "depth", RMSE, segmentation)
    control = write_depth_run(
        tmp_path / "random",
        [0.5, 1.0, 1.1, 0.95, 0.96],
        segmentation,
        untrained=True,
        seed=1,
    )
    classes = probe_runs.write_run(
        tmp_path / "classes", [0.8, 0.6, 0.7, 0.75, 0.74], root=segmentation
    )
    return {
        "depth": str(trained),
        "random": str(control),
        "classes": str(classes),
    }


def test_drop_and_recovery_equal_numpy_on_the_sums(folders):
    """Lower is better, so that drop and recovery are positive where RMSE rises and falls."""
    run = FinishedRun(folders["depth"])
    ours = run.effects
    rmse = run.sums[..., 1].double().numpy()
    weights = bootstrap_weights(DEPTH_IMAGES).double().numpy()
    best = 3 if "layer_02" == run.sites[3] else None
    for name, (a, b) in {"adapter_drop": (1, 0), "recovery": (1, best)}.items():
        value = ours[name].value
        assert value == pytest.approx(rmse[a].mean() - rmse[b].mean())
        assert value > 0
        expected = weights @ (rmse[a] - rmse[b]) / weights.sum(1)
        np.testing.assert_allclose(ours[name].resampled.numpy(), expected, rtol=1e-6)


def test_a_control_is_subtracted_and_named(
    segmentation,
    folders,
    tmp_path,
    caplog,
):
    depth = FinishedRun(folders["depth"])
    untrained = FinishedRun(folders["random"])
    (entry,) = task_results([depth, untrained])
    expected = depth.effects["recovery"].value - untrained.effects["recovery"].value
    assert entry["recovery_beyond_control"]["value"] == pytest.approx(expected)
    rmse = [0.5, 1.0, 1.1, 0.95, 0.96]
    metrics = {
        "untrained": ["llm"],
        "match": "update",
        "draw": 0,
    }
    matched = FinishedRun(
        write_depth_run(tmp_path / "matched", rmse, segmentation, metrics=metrics)
    )
    assert [task_results([depth, x])[0]["control_is"] for x in (matched, untrained)] == [
        "random",
        "untrained",
    ]
    other = FinishedRun(
        write_depth_run(
            tmp_path / "other",
            rmse,
            segmentation,
            "bidirectional",
            untrained=True,
        )
    )
    assert len(task_results([depth, other])) == 1
    assert f"{other.path} is left out" in caplog.text


def test_runs_of_tasks_can_be_told_their_model(folders, tmp_path):
    runs = read_task_runs(
        [f"ours={folders['depth']}", f"theirs={folders['depth']}", f"ours={folders['random']}"]
    )
    assert [(entry["model"], entry["control"] is None) for entry in task_results(runs)] == [
        ("ours", False),
        ("theirs", True),
    ]


def test_several_models_are_told_apart(segmentation, tmp_path):
    runs = []
    for model in ("ours", "theirs"):
        path = write_depth_run(tmp_path / model, RMSE, segmentation)
        runs.append(f"{model}={path}")
    tasks = task_results(read_task_runs(runs))
    for table in (tasks_by_site(tasks).rows, task_table(tasks, {"depth": {"rmse": "RMSE"}})):
        assert list(dict.fromkeys(row["model"] for row in table)) == ["ours", "theirs"]


def test_scores_are_in_units_of_the_encoders(folders):
    (entry,) = task_results([FinishedRun(folders["depth"])])
    rows = relative_scores(entry, "sites")
    assert rows[0]["value"] == 1
    assert rows[1]["value"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert all(low <= row["value"] <= high for row in rows for low, high in [row["ci95"]])
    assert relative_scores(entry, "control") == []


def test_a_bound_of_an_error_below_0_has_no_inverse(folders):
    (entry,) = task_results([FinishedRun(folders["depth"])])
    entry["sites"][1] |= {"value": 0.25, "ci95": [-0.1, 0.4]}
    entry["sites"][2] |= {"value": 0.25, "ci95": [0.0, 0.4]}
    encoder, *rows = relative_scores(entry, "sites")[:3]
    assert [row["ci95"] for row in rows] == [
        [pytest.approx(entry["sites"][0]["value"] / 0.4), np.inf]
    ] * 2
    tasks_by_site([entry]).figure.draw_without_rendering()


@pytest.fixture
def encoder(segmentation, tmp_path) -> FinishedRun:
    """Return a depth run of a bare encoder, whose layer 2 is the best."""
    metrics = {"model_kind": "encoder"}
    rmse = [0.9, 0.7, 0.4, 0.6, 0.58]
    path = write_depth_run(
        tmp_path / "encoder",
        rmse,
        segmentation,
        "bidirectional",
        sites=LAYERS,
        metrics=metrics,
    )
    return FinishedRun(path)


def test_a_bare_encoder_is_drawn_in_units_of_its_last_layer(encoder):
    results = task_results([encoder])
    (figure,) = task_figures([encoder], results)
    rmse = encoder.sums[..., 1].double().mean(1).numpy()
    drawn = {row["site"]: row["relative"] for row in figure.data.rows}
    expected = dict(zip(LAYERS[:4], rmse[3] / rmse[:4], strict=True))
    assert drawn == pytest.approx(expected)


def test_a_bare_encoder_has_a_table_of_its_own_with_the_gains_of_its_best_layer(
    encoder, segmentation, tmp_path
):
    random = {
        "model_kind": "encoder",
        "untrained": ["encoder"],
        "match": "update",
        "draw": 0,
    }
    rmse = [0.9, 0.88, 0.8, 0.85, 0.86]
    path = write_depth_run(
        tmp_path / "of_random",
        rmse,
        segmentation,
        "bidirectional",
        sites=LAYERS,
        metrics=random,
    )
    results = task_results([encoder, FinishedRun(path)])
    labels = {"depth": {"rmse": "RMSE (m)"}}
    assert task_table(results, labels) == []
    (row,) = encoder_task_table(results, labels)
    trained, control = (run.sums[..., 1].double().mean(1) for run in (encoder, FinishedRun(path)))
    over_patches = (trained[0] - trained[2]).item()
    expected = {
        "best_over_patches": over_patches,
        "best_over_last": (trained[3] - trained[2]).item(),
        "beyond_control": over_patches - (control[0] - control[2]).item(),
    }
    for name, value in expected.items():
        assert float(row[name].split()[0]) == pytest.approx(value, abs=0.006), name
    assert (row["patch_embeddings"], row["last_layer"]) == (
        f"{trained[0]:.3g}",
        f"{trained[3]:.3g}",
    )
    assert row["control"] == "random"


@pytest.mark.parametrize("without", [["causal", "bidirectional"], ["bidirectional"]])
def test_runs_without_the_causal_best_layer_are_reported_without_starvation(
    without, segmentation, tmp_path
):
    """Memory may have room for encoder and adapter only."""
    runs = []
    for mask in ("causal", "bidirectional"):
        runs.append(
            probe_runs.write_run(
                tmp_path / mask, [0.8, 0.6, 0.7, 0.75, 0.74], root=segmentation, mask=mask
            )
        )
        if mask in without:
            probe_runs.remove_layers(runs[-1])
    main(["report", *map(str, runs), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out/results.json").read_text())["starvation"] is None


@pytest.mark.parametrize("other", ["control", "mask"])
def test_trained_probes_are_not_compared_with_solved_ones(
    other,
    folders,
    segmentation,
    tmp_path,
):
    more = {"untrained": True} if other == "control" else {"mask": "bidirectional"}
    trained = write_depth_run(tmp_path / "trained", RMSE, segmentation, **more)
    metrics = json.loads((trained / "metrics.json").read_text())
    del metrics["path"]
    (trained / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(
        SystemExit, match="depth and .*trained cannot be compared: .* solved, .* trained"
    ):
        main(
            [
                "report",
                folders["classes"],
                "--out",
                str(tmp_path / "r"),
                "--tasks",
                folders["depth"],
                str(trained),
            ]
        )


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (["depth", "depth"], "pass one"),
        (["depth", "random", "second"], "random and .*second are .*; pass one"),
        (["classes"], "is a run of segmentation"),
    ],
)
def test_rejects_runs_that_do_not_fit(
    runs,
    message,
    folders,
    segmentation,
    tmp_path,
):
    """Of two controls, recovery beyond control would be that of whichever is passed first."""
    more = {"untrained": True, "metrics": {"draw": 1}}
    folders["second"] = str(write_depth_run(tmp_path / "second", RMSE, segmentation, **more))
    with pytest.raises(SystemExit, match=message):
        main(
            [
                "report",
                folders["classes"],
                "--out",
                str(tmp_path / "r"),
                "--tasks",
                *(folders[run] for run in runs),
            ]
        )


def test_damaged_sums_are_named(folders):
    save_file({"sums": torch.ones(2, 3)}, f"{folders['depth']}/counts.safetensors")
    with pytest.raises(ValueError, match="counts.safetensors: sums is"):
        _ = FinishedRun(folders["depth"]).sums
