"""A run is resumed, called finished and replaced only as its identity allows."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
from PIL import Image
from run_bytes import run_bytes
from safetensors.torch import load_file, save_file

import llava_bidir.cli
from llava_bidir.training.module import LlavaTraining


@pytest.fixture(scope="module")
def finished(parts, conversations, tmp_path_factory) -> tuple[Path, list[str]]:
    """Folder of a finished run and its command; its parts and data are copies, which tests may change and restore."""
    folder = tmp_path_factory.mktemp("finished")
    encoder, llm = parts
    copied = shutil.copytree(encoder.path, folder / "encoder")
    data, llm = (
        shutil.copytree(conversations, folder / "data"),
        shutil.copytree(llm, folder / "llm"),
    )
    command = ["fit", *tiny_models.training_arguments(parts, data), "--out", str(folder / "run")]
    command += [
        "--model.encoder.path",
        str(copied),
        "--model.llm",
        str(llm),
        "--trainer.max_epochs",
        "1",
    ]
    command += ["--data.val_annotations", "null"]
    llava_bidir.cli.main(command)
    return folder / "run", command


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of the run without its export, and the command that resumes it."""
    run, command = finished
    shutil.copytree(run / "checkpoints", tmp_path / "run/checkpoints")
    return tmp_path / "run", [*command, "--out", str(tmp_path / "run")]


def replace_answers(folder: Path) -> None:
    (file,) = (folder / "data").glob("*.json")
    records = json.loads(file.read_text())
    records[0]["conversations"][1]["value"] = "another answer"
    file.write_text(json.dumps(records))


def replace_picture(folder: Path) -> None:
    file = sorted((folder / "data/pictures").iterdir())[0]
    Image.new("RGB", (5, 5)).save(file)


def replace_encoder(folder: Path) -> None:
    weights = load_file(folder / "encoder/model.safetensors")
    save_file(
        {k: v + 1 for k, v in weights.items()},
        folder / "encoder/model.safetensors",
        {"format": "pt"},
    )


def replace_llm_config(folder: Path) -> None:
    config = json.loads((folder / "llm/config.json").read_text())
    (folder / "llm/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


CHANGES = {
    "mask": (
        ["--model.image_attention", "bidirectional"],
        "model.image_attention='causal', .* 'bidirectional'",
    ),
    "rate": (
        ["--model.adapter_learning_rate", "0.5"],
        "model.adapter_learning_rate=.*, but this run has 0.5",
    ),
    "epochs": (["--trainer.max_epochs", "2"], "trainer.max_epochs=1, but this run has 2"),
    "precision": (
        ["--trainer.precision", "bf16-mixed"],
        "trainer.precision='32-true', .* 'bf16-mixed'",
    ),
    "answers": (
        replace_answers,
        r"data.annotations='12 records, sha256 \w{16}', .*'12 records, sha256 \w{16}'",
    ),
    "pictures": (replace_picture, r"data.images='10, sha256 \w{16}', .*'10, sha256 \w{16}'"),
    "encoder": (replace_encoder, r"model.encoder/model.safetensors='\w{16}', .* '\w{16}'"),
    "llm": (replace_llm_config, r"model.llm/config.json='\w{16}', .* '\w{16}'"),
}


@pytest.mark.parametrize(("option", "value"), [("fast_dev_run", "true"), ("overfit_batches", "1")])
def test_options_after_which_a_trial_would_count_as_finished_are_refused(
    option, value, parts, conversations, tmp_path
):
    command = [
        "fit",
        *tiny_models.training_arguments(parts, conversations),
        "--out",
        str(tmp_path / "run"),
    ]
    with pytest.raises(
        SystemExit, match=f"trainer.{option} must be (False|0.0), got .*; for a trial, use"
    ):
        llava_bidir.cli.main([*command, f"--trainer.{option}", value])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_without_a_checkpoint_there_is_nothing_to_validate(command, finished, tmp_path):
    """The weights before training were validated as if they were the last ones."""
    _, (_, *options) = finished
    with pytest.raises(SystemExit, match="no valid checkpoint in .*run/checkpoints"):
        llava_bidir.cli.main(
            [command, *options, "--out", str(tmp_path / "run"), "--ckpt_path", "last"]
        )


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_of_another_identity_is_neither_resumed_nor_called_finished(
    finished, unfinished, change
):
    (run, command), (options, message) = finished, CHANGES[change]
    before, folder = run_bytes(run), run.parent
    if callable(options):
        for part in ("data", "encoder", "llm"):
            shutil.copytree(folder / part, folder / f"{part}_before")
        options, change = [], options(folder)
    copy, resuming = unfinished
    path = "last" if options else str(next((copy / "checkpoints").iterdir()))
    try:
        with pytest.raises(
            SystemExit, match=rf"^llava-bidir: \S*training.json belongs to a run with {message}"
        ):
            llava_bidir.cli.main([*command, *options, "--ckpt_path", "last"])
        with pytest.raises(
            SystemExit, match=rf"^llava-bidir: the checkpoint belongs to a run with {message}"
        ):
            llava_bidir.cli.main([*resuming, *options, "--ckpt_path", path])
    finally:
        for part in folder.glob("*_before"):
            shutil.rmtree(folder / part.name.removesuffix("_before"))
            part.rename(folder / part.name.removesuffix("_before"))
    assert not (copy / "hf").exists() and not (copy / "config.yaml").exists()
    assert run_bytes(run) == before


def test_settings_that_change_no_result_may_change(finished, unfinished, caplog):
    changed = [
        "--model.max_new_tokens",
        "2",
        "--model.attn_implementation",
        "eager",
        "--data.num_workers",
        "1",
    ]
    with caplog.at_level("INFO"):
        llava_bidir.cli.main([*finished[1], *changed, "--ckpt_path", "last"])
    assert "this run is finished; nothing to do" in caplog.text
    folder, command = unfinished
    llava_bidir.cli.main(
        [*command, *changed, "--ckpt_path", str(next((folder / "checkpoints").iterdir()))]
    )
    weights = [load_file(run / "hf/model.safetensors") for run in (folder, finished[0])]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            [],
            r"run holds a finished run \(hf/training.json\); add `--ckpt_path last`.*`--overwrite true`",
        ),
        (["--model.image_attention", "bidirectional"], "run holds a finished run"),
        (["--ckpt_path", "last", "--overwrite", "true"], "give one of them"),
        (["--overwrite", "true", "--model.adapter", "/nowhere"], "/nowhere"),
    ],
)
def test_repeating_a_command_changes_no_byte_of_a_finished_run(finished, options, message):
    run, command = finished
    before = run_bytes(run)
    with pytest.raises(SystemExit, match=message):
        llava_bidir.cli.main([*command, *options])
    assert run_bytes(run) == before


def test_a_run_that_replaces_another_and_is_killed_is_not_finished(
    finished, unfinished, monkeypatch
):
    folder, command = unfinished
    with pytest.raises(SystemExit, match="run holds checkpoints of an unfinished run, e.g. "):
        llava_bidir.cli.main(command)
    for left in ("hf", "nonfinite"):
        shutil.copytree(finished[0] / "hf", folder / left)
    with monkeypatch.context() as patch:
        patch.setattr("llava_bidir.training.callbacks.export_hf", lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            llava_bidir.cli.main([*command, "--trainer.max_epochs", "2", "--overwrite", "true"])
    assert not (folder / "hf").exists() and not (folder / "nonfinite").exists()
    assert len(list((folder / "checkpoints").iterdir())) == 1
    llava_bidir.cli.main([*command, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    steps = [
        json.loads((run / "hf/training.json").read_text())["steps"] for run in (folder, finished[0])
    ]
    assert steps[0] == 2 * steps[1]


def test_the_checkpoint_of_a_killed_run_does_not_stay_beside_newer_ones(finished, tmp_path):
    """Lightning keeps the one that a run was resumed from."""
    command = [*finished[1], "--out", str(tmp_path), "--trainer.max_epochs", "3"]
    checkpoints = lambda: [file.name for file in (tmp_path / "checkpoints").iterdir()]
    with pytest.MonkeyPatch.context() as patch:
        start = LlavaTraining.on_train_batch_start
        killed = lambda self, *batch: (
            sys.exit("killed") if self.trainer.global_step == 7 else start(self, *batch)
        )
        patch.setattr(LlavaTraining, "on_train_batch_start", killed)
        with pytest.raises(SystemExit, match="killed"):
            llava_bidir.cli.main(command)
    assert checkpoints() == ["epoch=1-step=6.ckpt"]
    llava_bidir.cli.main([*command, "--ckpt_path", "last"])
    assert checkpoints() == ["epoch=2-step=9.ckpt"]
