"""The report's section on other tasks: effects against numpy, verdicts beyond random draws, and what it shows."""

import json
from itertools import product
from pathlib import Path

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
    read_task_studies,
    task_results,
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


def results_of(*runs) -> list[dict]:
    return task_results(read_task_studies(map(str, runs)))


def random_draws(folder, root, rmse: list[float], untrained: list[str], **more) -> list[str]:
    """Write two draws of each kind of random weights, 0.01 m apart."""
    draws = []
    matches = ("none",) if untrained == ["adapter"] else ("update", "permuted")
    for match, draw in product(matches, (0, 1)):
        metrics = {"untrained": untrained, "match": match, "draw": draw} | more
        path = folder / f"{untrained[0]}_{match}{draw}"
        values = [value + 0.01 * draw for value in rmse]
        draws.append(str(write_depth_run(path, values, root, seed=1 + draw, metrics=metrics)))
    return draws


@pytest.mark.parametrize(
    ("random_rmse", "finding"),
    [([0.5, 0.8, 0.79, 0.78, 0.8], "supported"), (RMSE, "not learned")],
)
def test_recovery_is_supported_only_beyond_random_llms(
    random_rmse,
    finding,
    segmentation,
    tmp_path,
    folders,
):
    """It is of 0.25 m; random LLMs recover 0.02 m, or as much."""
    draws = random_draws(tmp_path, segmentation, random_rmse, ["llm"])
    (entry,) = results_of(folders["depth"], *draws)
    claims = {claim["claim"]: claim for claim in entry["claims"]}
    recovery = claims["recovery"]
    assert recovery["conclusion"] == finding
    runs = [FinishedRun(path) for path in (folders["depth"], *draws[:2])]
    trained, first, second = (run.effects["recovery"].value for run in runs)
    beyond = recovery["verdicts"]["beyond_random"]
    assert beyond["value"] == pytest.approx(trained - (first + second) / 2)
    assert "RMSE (m)" in recovery["text"]
    assert claims["adapter_drop"]["conclusion"] == "untested", "no random adapter"
    assert sorted((random["weights"], random["draw"]) for random in entry["random"]) == [
        *product(("permuted", "random"), (0, 1))
    ]


def test_an_effect_below_the_margin_is_no_finding(segmentation, tmp_path):
    """5 mm, with intervals a hundred times as short: significant, but depth counts from 0.01 m."""
    run = write_depth_run(tmp_path / "depth", [0.5, 0.805, 0.8, 0.9, 0.9], segmentation)
    sums = FinishedRun(run).sums.clone()
    sums[..., 1] = torch.tensor([0.5, 0.805, 0.8, 0.9, 0.9])[:, None]
    for name, kept in (
        ("counts.safetensors", sums),
        (probe_runs.BY_STRENGTH, sums.expand(4, *sums.shape)),
    ):
        save_file({"sums": kept.contiguous()}, run / name)
    probe_runs.write_effects(run)
    (entry,) = results_of(run)
    (recovery,) = (claim for claim in entry["claims"] if claim["claim"] == "recovery")
    assert recovery["verdicts"]["optimum"]["value"] == pytest.approx(0.005)
    assert recovery["verdicts"]["optimum"]["ci95"][0] > 0
    assert recovery["verdicts"]["optimum"]["verdict"] == "does not hold"


def test_a_control_without_its_trained_run_is_left_out(folders, caplog):
    assert results_of(folders["random"]) == []
    assert "no run of the trained model has its task" in caplog.text


def test_runs_of_tasks_can_be_told_their_model(folders):
    entries = results_of(
        f"ours={folders['depth']}", f"theirs={folders['depth']}", f"ours={folders['random']}"
    )
    assert [(entry["model"], len(entry["random"])) for entry in entries] == [
        ("ours", 1),
        ("theirs", 0),
    ]


def test_scores_are_in_units_of_the_encoders(folders):
    (entry,) = results_of(folders["depth"])
    rows = relative_scores(entry)
    assert rows[0]["relative"] == 1
    assert rows[1]["relative"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert all(row["low"] <= row["relative"] <= row["high"] for row in rows)


def test_a_bound_of_an_error_below_0_has_no_inverse(folders):
    (entry,) = results_of(folders["depth"])
    entry["sites"][1] |= {"value": 0.25, "ci95": [-0.1, 0.4]}
    entry["sites"][2] |= {"value": 0.25, "ci95": [0.0, 0.4]}
    encoder, *rows = relative_scores(entry)[:3]
    assert [(row["low"], row["high"]) for row in rows] == [
        (pytest.approx(entry["sites"][0]["value"] / 0.4), np.inf)
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
    studies = read_task_studies([str(encoder.path)])
    (figure,) = task_figures(studies, task_results(studies))
    rmse = encoder.sums[..., 1].double().mean(1).numpy()
    drawn = {row["site"]: row["relative"] for row in figure.data.rows}
    expected = dict(zip(LAYERS[:4], rmse[3] / rmse[:4], strict=True))
    assert drawn == pytest.approx(expected)


def test_trained_probes_are_not_compared_with_solved_ones(folders, segmentation, tmp_path):
    draws = random_draws(tmp_path, segmentation, RMSE, ["llm"])
    for folder in draws:
        file = Path(folder) / "metrics.json"
        metrics = json.loads(file.read_text())
        del metrics["path"]
        file.write_text(json.dumps(metrics))
    (entry,) = results_of(folders["depth"], *draws)
    assert entry["random"] == []
    (recovery,) = (claim for claim in entry["claims"] if claim["claim"] == "recovery")
    assert recovery["verdicts"]["beyond_random"]["verdict"] == "untested"


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["depth", "depth"], "pass only one"), (["classes"], "is a run of segmentation")],
)
def test_rejects_runs_that_do_not_fit(
    runs,
    message,
    folders,
    tmp_path,
):
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
