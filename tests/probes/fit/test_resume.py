"""A run is resumed, called finished and replaced only as its identity allows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_bytes import run_bytes
from safetensors.torch import load_file, save_file

from probes.cli import main

SETTINGS = """--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.max_epochs 1
--data.num_workers 0 --data.batch_size 4 --model.sites [adapter]""".split()


@pytest.fixture(scope="module")
def finished(checkpoints, segmentation, tmp_path_factory) -> tuple[Path, list[str]]:
    """Folder of a finished run and its command; its model and data are copies, which tests may change and restore."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(checkpoints["causal"], folder / "hf")
    shutil.copytree(segmentation, folder / "data")
    places = f"--model.mllm {folder}/hf --data.root {folder}/data --out {folder}/run".split()
    command = ["fit", *SETTINGS, *places]
    main(command)
    return folder / "run", command


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the run without its results, and the command that resumes it."""
    run, command = finished
    (tmp_path / "run").mkdir()
    shutil.copytree(run / "checkpoints", tmp_path / "run/checkpoints")
    return tmp_path / "run", [*command, "--out", str(tmp_path / "run")]


def replace_weights(folder: Path) -> None:
    file = folder / "hf/model.safetensors"
    weights = load_file(file)
    weights[min(weights)] += 1
    save_file(weights, file, {"format": "pt"})


def replace_image(folder: Path) -> None:
    file = sorted((folder / "data/images/validation").glob("*"))[0]
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)


def rename_class(folder: Path) -> None:
    file = folder / "data/classes.json"
    file.write_text(file.read_text().replace("sky", "heaven"))


CHANGES = {
    "mask": (
        ["--model.image_attention", "bidirectional"],
        r"model.image_attention=None.* 'bidirectional'",
    ),
    "batch": (["--data.batch_size", "3"], r"data.batch_size=4.* 3"),
    "length": (["--trainer.max_epochs", "2"], r"trainer.max_epochs=1.* 2"),
    "weights": (replace_weights, r"model.mllm/model.safetensors='\w{16}'.* '\w{16}'"),
    "image": (replace_image, r"data.validation_images='5, sha256 \w{16}'.*'5, sha256 \w{16}'"),
    "class": (rename_class, r"data.classes='3, sha256 \w{16}'.*'3, sha256 \w{16}'"),
}


@pytest.fixture(params=CHANGES)
def changed(request, finished):
    """(Changed options, message); the model or the data is changed on disk while the test runs."""
    change, message = CHANGES[request.param]
    if not callable(change):
        yield change, message
        return
    folder = finished[0].parent
    for part in ("hf", "data"):
        shutil.copytree(folder / part, folder / f"{part}_before")
    change(folder)
    yield [], message
    for part in ("hf", "data"):
        shutil.rmtree(folder / part)
        (folder / f"{part}_before").rename(folder / part)


def test_a_run_of_another_identity_is_neither_resumed_nor_called_finished(finished, changed):
    run, command = finished
    options, message = changed
    before = run_bytes(run)
    expected = rf"^probes: \S*metrics.json belongs to a run with {message}"
    with pytest.raises(SystemExit, match=expected):
        main([*command, *options, "--ckpt_path", "last"])
    assert run_bytes(run) == before


@pytest.mark.parametrize("changed", ["mask", "image"], indirect=True)
def test_a_checkpoint_of_another_identity_is_not_resumed(unfinished, changed):
    run, command = unfinished
    options, message = changed
    expected = rf"^probes: the checkpoint belongs to a run with {message}"
    with pytest.raises(SystemExit, match=expected):
        main([*command, *options, "--ckpt_path", f"{run}/checkpoints/last.ckpt"])
    assert not (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"run holds a finished run \(metrics.json\)"),
        (["--ckpt_path", "{run}/checkpoints/last.ckpt"], "run holds a finished run"),
        (["--ckpt_path", "last", "--overwrite", "true"], "give one of them"),
        (["--overwrite", "true", "--model.sites", "[layer_77]"], "layer_77"),
    ],
)
def test_repeating_a_command_changes_no_byte_of_a_finished_run(finished, options, message):
    run, command = finished
    before = run_bytes(run)
    with pytest.raises(SystemExit, match=message):
        main([*command, *(option.format(run=run) for option in options)])
    assert run_bytes(run) == before


def test_a_finished_run_is_finished_and_replaced_only_if_told(finished, tmp_path):
    run, command = finished
    before = run_bytes(run)
    harmless = "--data.num_workers 1 --data.name other --trainer.log_every_n_steps 1".split()
    main([*command, *harmless, "--ckpt_path", "last"])  # nothing to do
    with pytest.raises(SystemExit, match="finished without predictions"):
        main([*command, "--ckpt_path", "last", "--save_predictions", "true"])
    assert run_bytes(run) == before

    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "predictions").mkdir()
    main([*command, "--out", str(copy), "--overwrite", "true", "--trainer.max_epochs", "2"])
    assert json.loads((copy / "metrics.json").read_text())["probe"]["epochs"] == 2
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not (copy / "predictions").exists()
    assert len(list(copy.glob("events*"))) == 1, "the earlier run's events are gone"


def test_checkpoints_of_a_killed_run_are_not_replaced(unfinished):
    folder, command = unfinished
    with pytest.raises(SystemExit, match="holds an unfinished run .checkpoints/last.ckpt"):
        main(command)


@pytest.mark.parametrize("changed", ["weights", "image"], indirect=True)
def test_an_analysis_reads_only_what_was_probed(finished, changed):
    with pytest.raises(SystemExit, match=rf"run belongs to a run with {changed[1]}"):
        main(["maps", "--probes", str(finished[0]), "--image", "0"])
