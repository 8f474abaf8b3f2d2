"""The report's section on other tasks: effects against numpy, controls, the path, and what it shows."""

import csv
import json
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import scipy.stats
import torch
from probes.report.task_starvation import starvation_table, task_starvation
from safetensors.torch import load_file, save_file

from llava_bidir.common.bootstrap import bootstrap_weights
from probes import TaskRun
from probes.cli import main
from probes.models.sites import site_names
from probes.report.beyond_classes import effects, joint_task_results, read_task_runs, task_results, task_table
from probes.report.figures.beyond_classes import relative_scores, starvation_by_task, task_figures, tasks_by_site
from probes.tasks import TASKS
from probes.training.write_run import task_summary

IMAGES, STRENGTHS = 40, [1.0, 1e-1, 1e-3, 1e-5]
ROWS = ["stronger", "chosen", "weaker"]


def write_task_run(
    path,
    rmse: list[float],
    root,
    mask: str = "causal",
    untrained: bool = False,
    seed: int = 0,
    by_token: bool = True,
    **more,
):
    """Write a depth run whose encoder, adapter, layers and final norm have the mean RMSE `rmse`; 2 if stronger."""
    probe_runs.write_run(path, [0.5] * len(rmse), root=root, mask=mask, untrained=untrained, images=IMAGES, **more)
    sites, task = site_names(len(rmse) - 3), TASKS["depth"]
    noise = torch.rand(len(rmse), IMAGES, 6, generator=torch.Generator().manual_seed(seed)) * 0.1
    sums = torch.cat([torch.ones(len(rmse), IMAGES, 1), noise], -1)
    sums[..., 1] += torch.tensor(rmse)[:, None] - 0.05
    along = torch.stack([sums] * len(STRENGTHS))
    along[1, ..., 1] = 2
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
    along_path = {name: [1.0] * len(STRENGTHS) for name in ("cv_loss", *scores)}
    choice = {"strengths": STRENGTHS, "chosen": 1e-3, "lowest": 1e-3}
    metrics["path"] = {"passes": 1, "closed_form": {"sites": [{"site": x, **choice, **along_path} for x in sites]}}
    (path / "metrics.json").write_text(json.dumps(metrics))
    tokens = 0.2 + torch.rand(len(rmse), IMAGES, 4, generator=torch.Generator().manual_seed(50 + seed))
    tokens[..., 0] += mask == "causal"  # patch 0 starves
    patches = {"patch_error": 100 * tokens, "patch_valid": torch.full((IMAGES, 4), 100.0)} if by_token else {}
    save_file({"sums": sums} | patches, path / "counts.safetensors")
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
    assert [row["row"] for row in entry["path"]] == ROWS
    assert entry["path"][1]["recovery"] == entry["recovery"] and entry["path"][0]["recovery"]["value"] == 0


def test_strengths_without_certificates_do_not_count(folders):
    path = Path(folders["depth"])
    metrics = json.loads((path / "metrics.json").read_text())
    metrics["path"]["optimum"] = metrics["path"].pop("closed_form")
    for entry in metrics["path"]["optimum"]["sites"]:
        entry["certificates"] = [{"converged": r != 1e-5 or entry["site"] != "layer_02"} for r in STRENGTHS]
    (path / "metrics.json").write_text(json.dumps(metrics))
    save_file({"optimum/sums": load_file(path / "path.safetensors")["closed_form/sums"]}, path / "path.safetensors")
    entries = task_results([TaskRun(path)])
    assert [row["converged"] for row in entries[0]["path"]] == [True, True, False]
    (row,) = task_table(entries, {"depth": {"rmse": "RMSE"}})
    assert row["strengths_with_recovery"] == "1 of 3", "one has not converged, at the last there is no recovery"


def test_a_control_says_what_is_random(segmentation, folders, tmp_path, caplog):
    metrics = {"untrained": ["llm"], "match": "update", "draw": 0}
    rmse = [0.5, 1.0, 1.1, 0.95, 0.96]
    matched = TaskRun(write_task_run(tmp_path / "matched", rmse, segmentation, metrics=metrics))
    depth, untrained = TaskRun(folders["depth"]), TaskRun(folders["random"])
    texts = [task_results([depth, control])[0]["control_is"] for control in (matched, untrained)]
    assert texts == ["random LLM that changes the states as much", "untrained adapter and LLM"]
    seeds = [task_results([depth, control])[0] | {"seed": i} for i, control in enumerate((matched, untrained))]
    (joint,) = joint_task_results(seeds)
    assert "recovery" in joint and "recovery_beyond_control" not in joint and joint["control"] is None
    other = TaskRun(write_task_run(tmp_path / "other", rmse, segmentation, "bidirectional", untrained=True))
    assert len(task_results([depth, other])) == 1 and f"{other.path} is left out" in caplog.text


def test_runs_of_tasks_can_be_told_their_model(folders, tmp_path):
    runs = read_task_runs([f"ours={folders['depth']}", f"theirs={folders['depth']}", f"ours={folders['random']}"])
    assert [(entry["model"], entry["control"] is None) for entry in task_results(runs)] == [
        ("ours", False),
        ("theirs", True),
    ]


def test_several_models_are_told_apart(segmentation, tmp_path):
    runs = [
        f"{model}={write_task_run(tmp_path / f'{model}_{mask}', [0.5, 0.8, 0.7, 0.55, 0.56], segmentation, mask=mask)}"
        for model in ("ours", "theirs")
        for mask in ("causal", "bidirectional")
    ]
    runs = read_task_runs(runs)
    tasks, starved = task_results(runs), task_starvation(runs)
    models = ["ours", "theirs"]
    for rows in (task_table(tasks, {"depth": {"rmse": "RMSE"}}), starvation_table(starved)):
        assert list(dict.fromkeys(row["model"] for row in rows)) == models
    for figure, rows in (tasks_by_site(tasks), starvation_by_task(starved, [])):
        assert [ax.get_title() for ax in figure.axes] == [f"depth\n{model}, toy world" for model in models]
        assert list(dict.fromkeys(row["model"] for row in rows)) == models


def test_scores_are_in_units_of_the_encoders(folders):
    (entry,) = task_results([TaskRun(folders["depth"])])
    rows = relative_scores(entry, "sites")
    assert rows[0]["value"] == 1 and rows[1]["value"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert all(low <= row["value"] <= high for row in rows for low, high in [row["ci95"]])
    assert relative_scores(entry, "control") == []


def test_a_bound_of_an_error_below_0_has_no_inverse(folders):
    (entry,) = task_results([TaskRun(folders["depth"])])
    entry["sites"][1] |= {"value": 0.25, "ci95": [-0.1, 0.4]}
    entry["sites"][2] |= {"value": 0.25, "ci95": [0.0, 0.4]}
    encoder, *rows = relative_scores(entry, "sites")[:3]
    assert [row["ci95"] for row in rows] == [[pytest.approx(entry["sites"][0]["value"] / 0.4), np.inf]] * 2
    tasks_by_site([entry]).figure.draw_without_rendering()


def test_captions_say_over_what_intervals_are(segmentation, tmp_path):
    """Two models with a seed each are not two seeds of a model."""
    runs = []
    for name, mask, seed in (("a", "causal", 0), ("b", "causal", 1), ("b", "bidirectional", 1), ("b", "causal", 2)):
        path = tmp_path / f"{name}{mask}{seed}"
        metrics = {"seed": seed, "mllm": f"models/{name}"}
        runs.append(TaskRun(write_task_run(path, CURVES[0], segmentation, mask, seed=seed, metrics=metrics)))
    caption = lambda runs: (
        next(
            task_figures(runs, {"tasks": task_results(runs), "tasks_starvation": [], "joint_tasks_starvation": []})
        ).caption
    )
    assert caption(runs[:3]).endswith("Bands: 95% intervals over images.")
    assert caption(runs).endswith("Bands: 95% intervals over seeds; over images where there is one seed only.")
    assert caption([runs[1], runs[3]]).endswith("Bands: 95% intervals over seeds.")


def test_report_has_the_section_only_with_runs_of_tasks(folders, tmp_path):
    main(["report", folders["classes"], "--out", str(tmp_path / "without")])
    assert "Beyond classes" not in (tmp_path / "without/index.html").read_text()
    assert "tasks" not in json.loads((tmp_path / "without/results.json").read_text())
    out = tmp_path / "with"
    main(["report", folders["classes"], "--out", str(out), "--tasks", folders["depth"], folders["random"]])
    page = (out / "index.html").read_text()
    assert "<h2>Beyond classes</h2>" in page and "Exploratory" in page and "RMSE (m), lower is better" in page
    assert json.loads((out / "results.json").read_text())["tasks"][0]["task"] == "depth"
    assert {"tasks.png", "tasks.pdf", "tasks.csv", "tasks_table.csv"} <= {file.name for file in out.iterdir()}


CURVES = {0: [0.5, 0.8, 0.7, 0.55, 0.56], 1: [0.5, 0.9, 0.8, 0.5, 0.5], 2: [0.6, 0.7, 0.75, 0.65, 0.6]}


@pytest.fixture(params=["images of each seed", "the same images"])
def seeds(request, segmentation, tmp_path) -> tuple[list[str], list[str], bool]:
    """Depth runs of three seeds with controls, whose RMSE is higher by 0.1 x seed, and their runs of classes.

    Returns:
        Folders of tasks, folders of classes, and whether the seeds share their images.
    """
    tasks, classes, shared = [], [], request.param == "the same images"
    for seed, rmse in CURVES.items():
        own = f"world {0 if shared else seed}"  # the name, and so the data's fingerprint
        more = {"metrics": {"seed": seed, "dataset": "toy world"}, "dataset": own}
        worse = [x + 0.1 * seed for x in rmse]
        tasks.append(write_task_run(tmp_path / f"d{seed}", rmse, segmentation, seed=seed, **more))
        control = write_task_run(tmp_path / f"r{seed}", worse, segmentation, untrained=True, seed=9 + seed, **more)
        tasks.append(control)
        classes.append(
            probe_runs.write_run(tmp_path / f"c{seed}", [0.8, 0.6, 0.7, 0.75, 0.74], root=segmentation, **more)
        )
    return [str(path) for path in tasks], [str(path) for path in classes], shared


def test_several_seeds_are_joined_as_claims_are(seeds, tmp_path):
    """Means, intervals of Student's t written out, and each seed against its own control, also on the same images."""
    tasks, classes, shared = seeds
    main(["report", *classes, "--tasks", *tasks, "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    (joint,) = results["joint_tasks"]
    assert joint["seeds"] == [0, 1, 2] and [entry["seed"] for entry in results["tasks"]] == [0, 1, 2]
    for trained, control, entry in zip(tasks[::2], tasks[1::2], results["tasks"], strict=True):
        ours, other = (effects(TaskRun(path), TaskRun(path).sums)["recovery"][0] for path in (trained, control))
        assert entry["recovery_beyond_control"]["value"] == pytest.approx(ours - other)
        (alone,) = task_results([TaskRun(trained), TaskRun(control)])
        assert alone == entry, "a seed has the numbers that it has alone"
    for name in ("adapter_drop", "recovery", "recovery_beyond_control"):
        values = np.array([entry[name]["value"] for entry in results["tasks"]])
        assert list(joint[name]["by_seed"].values()) == values.tolist() and joint[name]["value"] == values.mean()
        half = scipy.stats.t.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
        images = np.mean([(np.diff(entry[name]["ci95"])[0] / 2) ** 2 for entry in results["tasks"]]) ** 0.5
        half = np.hypot(half, images) if shared else max(half, images / 3**0.5)
        assert joint[name]["ci95"] == pytest.approx([values.mean() - half, values.mean() + half])
    assert [row["row"] for row in joint["path"]] == ROWS
    page = (tmp_path / "out/index.html").read_text()
    assert "Drop and recovery by task, seeds jointly" in page and "Thin: one seed; thick: their mean" in page
    rows = list(csv.DictReader((tmp_path / "out/tasks.csv").open()))
    assert [row["seed"] for row in rows if row["site"] == "adapter" and row["weights"] == "trained"] == [*"012", "mean"]
    relative = [float(row["relative"]) for row in rows if row["site"] == "adapter" and row["weights"] == "trained"]
    assert relative[3] == pytest.approx(np.mean(relative[:3]))
    table = list(csv.DictReader((tmp_path / "out/joint_tasks_table.csv").open()))
    assert [row["seed"] for row in table] == ["0, 1, 2"]


@pytest.mark.parametrize("count", [1, 3])
def test_starvation_of_seeds_equals_numpy(count, segmentation, tmp_path):
    paths, gaps, rows = [], [], []
    for seed in range(count):
        more = {"metrics": {"seed": seed, "dataset": "toy world"}, "dataset": f"world {seed}"}
        pair = []
        for mask in ("causal", "bidirectional"):
            path = tmp_path / f"{mask}{seed}"
            pair.append(write_task_run(path, CURVES[seed], segmentation, mask, seed=seed + 7 * len(pair), **more))
        peak = [TaskRun(path).sites.index(TaskRun(pair[0]).peak_layer) for path in pair]
        error = [load_file(path / "counts.safetensors")["patch_error"][i] for path, i in zip(pair, peak, strict=True)]
        causal, other = (x.double().numpy().sum(0) / (100 * IMAGES) for x in error)
        gaps.append(causal - other)
        rows.append((causal[:2] - other[:2]).mean())
        paths += map(str, pair)
    classes = str(probe_runs.write_run(tmp_path / "classes", [0.8, 0.6, 0.7, 0.75, 0.74], root=segmentation))
    main(["report", classes, "--tasks", *paths, "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [entry["seed"] for entry in results["tasks_starvation"]] == list(range(count))
    for entry, gap, row in zip(results["tasks_starvation"], gaps, rows, strict=True):
        np.testing.assert_allclose(entry["gap"], gap, rtol=1e-5)
        assert entry["gap_ci95"][0][0] > 0 and entry["first_row"]["gap"] == pytest.approx(row)
    page = (tmp_path / "out/index.html").read_text()
    assert "Starvation of other tasks" in page and "squared error of log depth" in page
    drawn = list(csv.DictReader((tmp_path / "out/tasks_starvation.csv").open()))
    assert [row["seed"] for row in drawn if row["patch"] == "0"] == [*map(str, range(count)), *["mean"] * (count > 1)]
    assert ("joint_tasks_starvation" in results) == (count > 1) == ("Starvation by task, seeds jointly" in page)
    if count > 1:
        (joint,) = results["joint_tasks_starvation"]
        np.testing.assert_allclose(joint["gap"], np.mean(gaps, 0), rtol=1e-5)
        half = scipy.stats.t.ppf(0.975, count - 1) * np.std(gaps, 0, ddof=1) / count**0.5
        images = [np.diff([entry["gap_ci95"] for entry in results["tasks_starvation"]], axis=-1)[..., 0] / 2]
        half = np.maximum(half, (np.array(images[0]) ** 2).mean(0) ** 0.5 / count**0.5)
        np.testing.assert_allclose(np.diff(joint["gap_ci95"], axis=-1)[:, 0] / 2, half, rtol=1e-4)
        assert joint["first_row"]["gap"] == pytest.approx(np.mean(rows))


def test_a_run_without_errors_by_position_is_reported_without_starvation(segmentation, folders, tmp_path, caplog):
    other = write_task_run(tmp_path / "b", CURVES[0], segmentation, "bidirectional", by_token=False)
    main(["report", folders["classes"], "--tasks", folders["depth"], str(other), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["tasks"]) == 2 and "tasks_starvation" not in results
    assert f"{other} was made before errors by position were kept" in caplog.text


@pytest.mark.parametrize("without", [["causal", "bidirectional"], ["bidirectional"]])
def test_runs_without_the_causal_best_layer_are_reported_without_starvation(without, segmentation, tmp_path, caplog):
    """Of tasks and of classes: memory may have room for encoder and adapter only."""
    tasks, classes = [], []
    for mask in ("causal", "bidirectional"):
        tasks.append(write_task_run(tmp_path / f"depth_{mask}", CURVES[0], segmentation, mask))
        classes.append(probe_runs.write_run(tmp_path / mask, [0.8, 0.6, 0.7, 0.75, 0.74], root=segmentation, mask=mask))
        for path in (tasks[-1], classes[-1]) if mask in without else ():
            probe_runs.remove_layers(path)
    main(["report", *map(str, classes), "--tasks", *map(str, tasks), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["starvation"] is None and "tasks_starvation" not in results
    assert len(results["tasks"]) == 2 and all("adapter_drop" in entry for entry in results["tasks"])
    assert "is left out, since they do not share the causal run's best layer" in caplog.text


def test_one_seed_has_no_joint_part(folders, tmp_path):
    main(["report", folders["classes"], "--out", str(tmp_path), "--tasks", folders["depth"], folders["random"]])
    assert "joint_tasks" not in json.loads((tmp_path / "results.json").read_text())
    assert "seeds jointly" not in (tmp_path / "index.html").read_text()
    assert not (tmp_path / "joint_tasks_table.csv").exists()


def test_two_runs_of_one_seed_are_an_error(folders, segmentation, tmp_path):
    """Which of the two is to stand beside a third one of another seed?"""
    twice = write_task_run(tmp_path / "twice", CURVES[0], segmentation, metrics={"mllm": "other/hf"})
    with pytest.raises(SystemExit, match="depth and .*twice are of the same task, model, data and seed; pass one"):
        main(["report", folders["classes"], "--out", str(tmp_path / "r"), "--tasks", folders["depth"], str(twice)])


def test_a_second_control_is_an_error(folders, segmentation, tmp_path):
    """Recovery beyond control would be that of whichever is passed first: here +0.2 or 0.0."""
    more = {"untrained": True, "metrics": {"draw": 1}}
    second = write_task_run(tmp_path / "draw1", [0.5, 1.0, 1.1, 0.75, 0.96], segmentation, **more)
    runs = [folders["depth"], folders["random"], str(second)]
    with pytest.raises(SystemExit, match="random and .*draw1 are .*; pass one"):
        main(["report", folders["classes"], "--out", str(tmp_path / "r"), "--tasks", *runs])


@pytest.mark.parametrize("other", ["control", "mask"])
def test_trained_probes_are_not_compared_with_solved_ones(other, folders, segmentation, tmp_path):
    more = {"untrained": True} if other == "control" else {"mask": "bidirectional"}
    trained = write_task_run(tmp_path / "trained", CURVES[0], segmentation, **more)
    metrics = json.loads((trained / "metrics.json").read_text())
    del metrics["path"]
    (trained / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(SystemExit, match="depth and .*trained cannot be compared: .* solved, .* trained"):
        main(["report", folders["classes"], "--out", str(tmp_path / "r"), "--tasks", folders["depth"], str(trained)])


def test_seeds_with_other_kinds_of_probes_are_not_joined(segmentation, tmp_path):
    runs = []
    for seed, solved in enumerate(("closed_form", "closed_form", "optimum")):
        more = {"metrics": {"seed": seed, "dataset": "toy world"}, "dataset": f"world {seed}"}
        path = write_task_run(tmp_path / str(seed), CURVES[seed], segmentation, seed=seed, **more)
        metrics = json.loads((path / "metrics.json").read_text())
        metrics["probe"]["solved"] = solved
        (path / "metrics.json").write_text(json.dumps(metrics))
        runs.append(TaskRun(path))
    assert [joint["seeds"] for joint in joint_task_results(task_results(runs))] == [[0, 1]]


@pytest.mark.parametrize(
    ("runs", "message"), [(["depth", "depth"], "pass one"), (["classes"], "is a run of segmentation")]
)
def test_rejects_runs_that_do_not_fit(runs, message, folders, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["report", folders["classes"], "--out", str(tmp_path / "r"), "--tasks", *(folders[run] for run in runs)])


def test_damaged_sums_are_named(folders):
    save_file({"sums": torch.ones(2, 3)}, f"{folders['depth']}/counts.safetensors")
    with pytest.raises(ValueError, match="counts.safetensors: sums is"):
        _ = TaskRun(folders["depth"]).sums
