"""Maps of other tasks than segmentation, against independent forwards; commands about classes name the task."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from probes import TaskRun
from probes.analyses.maps.figures import task_maps
from probes.cli import main
from probes.data.normals import decode_normals

TASKS = ("depth", "normals", "boundaries")


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)).save(tmp_path / "odd.png")
    return tmp_path / "odd.png"


def expected(run: TaskRun, photo, site: str) -> np.ndarray:
    """Own forward, F.interpolate, and what the channels mean."""
    mllm, image = run.mllm(), Image.open(photo).convert("RGB")
    states = mllm.states(mllm.preprocess([image]), [site])[site]
    channels = run.probes()[site](states.float()).transpose(1, 2).unflatten(-1, mllm.grid)
    maps = F.interpolate(channels, (image.height, image.width), mode="bilinear")[0].double().numpy()
    if run.task_name == "depth":
        return np.exp(maps[0])
    if run.task_name == "normals":
        return np.moveaxis(maps / np.linalg.norm(maps, axis=0), 0, -1)
    return np.exp(maps[1]) / np.exp(maps).sum(0)


@pytest.mark.parametrize("task", TASKS)
def test_maps_of_photos_are_in_the_format_of_the_targets(task, task_runs, photo, tmp_path, capsys):
    run, out = task_runs[task], tmp_path / "out"
    main(["segment", "--probes", str(run.path), str(photo), "--site", "encoder", "--out", str(out)])
    written, truth = Image.open(out / "odd.png"), expected(run, photo, "encoder")
    values, legend = np.asarray(written), json.loads((out / "legend.json").read_text())
    if task == "depth":
        assert written.mode == "I;16" and legend["unit"] == 0.001, "depth_scale of targets.json"
        assert np.abs(values * 0.001 - truth).max() <= 0.0005 + 1e-4 * truth.max()
    if task == "normals":
        assert np.degrees(np.arccos(np.clip((decode_normals(written, photo) * truth).sum(-1), -1, 1))).max() < 1
    if task == "boundaries":
        assert written.mode == "L" and np.abs(values / 255 - truth).max() <= 0.5 / 255 + 1e-4
    np.testing.assert_allclose(run.predict(Image.open(photo), "encoder"), truth, rtol=1e-3, atol=1e-3)
    colours = np.asarray(Image.open(out / "odd_colours.png")).astype(int)
    assert np.abs(colours - run.task.colorize(truth).astype(int)).max() <= 3
    assert (legend["task"], legend["site"], legend["runs"]) == (task, "encoder", [run.fingerprint])
    assert {file.name for file in out.iterdir()} == {"odd.png", "odd_colours.png", "legend.json"}
    assert f"maps of 1 photos at encoder ({task}" in capsys.readouterr().out


def test_depth_without_its_data_set_and_beyond_16_bits_is_said(task_runs, photo, tmp_path, monkeypatch, capsys):
    path = shutil.copytree(task_runs["depth"].path, tmp_path / "run")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["data"]["root"] = "/nowhere"
    (path / "manifest.json").write_text(json.dumps(manifest))
    far = np.linspace(1, 512, 37 * 53, dtype=np.float32).reshape(37, 53)
    monkeypatch.setattr(TaskRun, "predict", lambda self, image, site: far)
    main(["segment", "--probes", str(path), str(photo), "--out", str(tmp_path / "out")])
    legend = json.loads((tmp_path / "out/legend.json").read_text())
    values = np.asarray(Image.open(tmp_path / "out/odd.png"))
    assert legend["unit"] == 1 / 256 and legend["clipped"] == pytest.approx(0.5, abs=0.01)
    assert "50.1% of the pixels are beyond their range" in capsys.readouterr().out
    np.testing.assert_allclose(values[far < 255.9] / 256, far[far < 255.9], atol=0.5 / 256 + 1e-6)
    assert (values[far > 256] == 65535).all()


def test_files_of_others_are_not_replaced(task_runs, photo, tmp_path):
    command = ["segment", "--probes", str(task_runs["depth"].path), str(photo), "--out"]
    for _ in range(2):
        main([*command, str(tmp_path / "out")])
    Image.open(photo).save(tmp_path / "out/odd_colours.png")
    with pytest.raises(SystemExit, match="odd_colours.png exists and was not written by `probes segment`"):
        main([*command, str(tmp_path / "out")])


@pytest.mark.parametrize("task", TASKS)
def test_maps_equal_the_saved_predictions_and_are_drawn_beside_the_target(task, task_runs, tmp_path):
    run = TaskRun(shutil.copytree(task_runs[task].path, tmp_path / "run"))
    main(["maps", "--probes", str(run.path), "--image", "1", "3"])
    tensors, index = load_file(run.path / "maps.safetensors"), run.analysis("maps.json")
    dataset = run.dataset()
    assert index["sites"] == run.sites and index["knockout"] == []
    for image in index["images"]:
        name = dataset.names[image["index"]]
        saved = np.stack([np.load(run.path / "predictions" / site / f"{name}.npy") for site in run.sites])
        np.testing.assert_allclose(tensors[f"image/{image['index']}"].numpy(), saved, atol=2e-3, rtol=2e-3)
    axes = task_maps(run).figure.axes
    titles = [ax.get_title() for ax in axes if ax.get_title()]
    assert titles[:4] == ["image", "target", "encoder", "adapter"] and len(axes) == 2 * len(titles)
    target = run.task.truth(torch.from_numpy(dataset[3]["target"])[None])[0].numpy()
    predicted = [tensors["image/3"].numpy()[run.sites.index(title.replace(" ", "_"))] for title in titles[2:]]
    shown = np.concatenate([target, *predicted])
    drawn = np.concatenate([ax.images[0].get_array() for ax in axes[len(titles) + 1 :]])
    np.testing.assert_array_equal(drawn, run.task.colorize(shown))
    assert (drawn[: len(target)][~np.isfinite(target).reshape(*target.shape[:2], -1).all(-1)] == 0).all()


def test_report_has_the_maps(task_runs, runs, tmp_path):
    run = shutil.copytree(task_runs["depth"].path, tmp_path / "run")
    main(["maps", "--probes", str(run), "--image", "0"])
    main(["report", str(runs["causal"].path), "--tasks", str(run), "--out", str(tmp_path / "out")])
    assert "Predictions by layer, depth, causal, seed 0" in (tmp_path / "out/index.html").read_text()
    assert (tmp_path / "out/tasks_maps_0.png").is_file()


ABOUT_CLASSES = {
    "knockout": ["--probes", "RUN", "--classes", "auto:1"],
    "answers": ["--probes", "RUN"],
    "patching": ["--probes", "RUN"],
    "umap": ["--probes", "RUN"],
    "explore": ["RUN", "--images", "0", "--out", "OUT"],
    "lab": ["RUN"],
    "report": ["RUN", "--out", "OUT"],
    "maps": ["--probes", "RUN", "--classes", "a"],
}


@pytest.mark.parametrize("command", ABOUT_CLASSES)
def test_what_is_about_classes_names_the_task(command, task_runs, tmp_path):
    paths = {"RUN": str(task_runs["normals"].path), "OUT": str(tmp_path / "out")}
    options = [paths.get(word, word) for word in ABOUT_CLASSES[command]]
    with pytest.raises(SystemExit, match="^probes: .*probes of the task normals, but .* about .*classes") as stop:
        main([command, *options])
    assert "\n" not in str(stop.value.code) and not (tmp_path / "out").exists()
