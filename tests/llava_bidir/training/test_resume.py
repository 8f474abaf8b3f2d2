"""A run is resumed, called finished and replaced only as its identity allows."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
from PIL import Image
from run_bytes import assert_same_export, run_bytes
from safetensors.torch import load_file, save_file

from llava_bidir.cli import main
from llava_bidir.common.identity import run_identity
from llava_bidir.training.cli import build_cli

# Settings that change no result beyond rounding
HARMLESS = "--model.max_new_tokens 2 --model.attn_implementation eager --data.num_workers 1".split()


def copied_parts(folder: Path, parts, conversations) -> list[str]:
    """Return the options of a run of one epoch on copies of its models and data, which a test may change."""
    encoder, llm = parts
    data = shutil.copytree(conversations, folder / "data")
    shutil.copytree(encoder.path, folder / "encoder")
    shutil.copytree(llm, folder / "llm")
    more = f"--model.encoder.path {folder}/encoder --model.llm {folder}/llm"
    more += " --trainer.max_epochs 1 --data.val_annotations null"
    return [*tiny_models.training_arguments(parts, data), *more.split()]


@pytest.fixture(scope="module")
def finished(parts, conversations, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return the folder of a finished run and its command."""
    folder = tmp_path_factory.mktemp("finished")
    options = copied_parts(folder, parts, conversations)
    command = ["fit", *options, "--out", str(folder / "run")]
    main(command)
    return folder / "run", command


@pytest.fixture
def unfinished(finished, tmp_path) -> tuple[Path, list[str]]:
    """Return a copy of the run without its export, and the command that resumes it."""
    run, command = finished
    shutil.copytree(run / "checkpoints", tmp_path / "run/checkpoints")
    return tmp_path / "run", [*command, "--out", str(tmp_path / "run")]


def checkpoint(run: Path) -> str:
    (file,) = (run / "checkpoints").iterdir()
    return str(file)


# ---------------------------------------------------------------------------------------------------- identity
def replace_answers(folder: Path) -> None:
    file = folder / "data/data.json"
    records = json.loads(file.read_text())
    records[0]["conversations"][1]["value"] = "another answer"
    file.write_text(json.dumps(records))


def replace_picture(folder: Path) -> None:
    file = sorted((folder / "data/pictures").iterdir())[0]
    Image.new("RGB", (5, 5)).save(file)


def replace_encoder(folder: Path) -> None:
    file = folder / "encoder/model.safetensors"
    weights = {name: weight + 1 for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def replace_llm_config(folder: Path) -> None:
    file = folder / "llm/config.json"
    config = json.loads(file.read_text()) | {"rms_norm_eps": 0.1}
    file.write_text(json.dumps(config))


CHANGES = {  # key of the identity that changes: options, or a change of files
    "settings.model.image_attention": ["--model.image_attention", "bidirectional"],
    "settings.model.adapter_learning_rate": ["--model.adapter_learning_rate", "0.5"],
    "settings.data.micro_batch_size": ["--data.micro_batch_size", "2"],
    "settings.trainer.max_epochs": ["--trainer.max_epochs", "2"],
    "settings.trainer.precision": ["--trainer.precision", "bf16-mixed"],
    "data.annotations": replace_answers,
    "data.images": replace_picture,
    "model.encoder/model.safetensors": replace_encoder,
    "model.llm/config.json": replace_llm_config,
}


def identity(options: list[str]) -> dict[str, object]:
    """Return the identity of a run with these options by "SECTION.KEY"."""
    cli = build_cli(options, run=False)
    found = run_identity(cli.trainer, cli.model, cli.datamodule)
    return {
        f"{section}.{key}": value
        for section, entries in found.items()
        for key, value in entries.items()
    }


def test_a_change_of_settings_data_or_models_changes_its_key_of_the_identity_and_no_other(
    parts, conversations, tmp_path
):
    options = copied_parts(tmp_path, parts, conversations)
    before = identity(options)
    assert identity([*options, *HARMLESS]) == before
    for key, change in CHANGES.items():
        if callable(change):
            change(tmp_path)
            after = identity(options)
        else:
            after = identity([*options, *change])
        different = {name for name in before | after if before.get(name) != after.get(name)}
        assert different == {key}
        if callable(change):
            before = after


MASKS = "model.image_attention='causal', but this run has 'bidirectional'"
LENGTHS = "trainer.max_epochs=1, but this run has 2; resume with the original setting"
IMAGES = r"data.images='10, sha256 \w{16}', .*'10, sha256 \w{16}'"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("settings.model.image_attention", MASKS),
        ("settings.trainer.max_epochs", LENGTHS),
        ("data.images", IMAGES),
    ],
)
def test_a_run_of_another_identity_is_neither_resumed_nor_called_finished(
    key, message, finished, unfinished, parts, conversations, tmp_path
):
    run, command = finished
    copy, resuming = unfinished
    before = run_bytes(run)
    options = CHANGES[key]
    if callable(options):
        options = copied_parts(tmp_path / "copies", parts, conversations)
        CHANGES[key](tmp_path / "copies")
    for words, source in ((command, r"\S*json"), (resuming, "the checkpoint")):
        expected = f"^llava-bidir: {source} belongs to a run with {message}"
        with pytest.raises(SystemExit, match=expected):
            main([*words, *options, "--ckpt_path", "last"])
    assert not (copy / "hf").exists()
    assert not (copy / "config.yaml").exists()
    assert run_bytes(run) == before


def test_settings_that_change_no_result_may_change(finished, unfinished, caplog):
    run, command = finished
    with caplog.at_level("INFO"):
        main([*command, *HARMLESS, "--ckpt_path", "last"])
    assert "this run is finished; nothing to do" in caplog.text
    copy, resuming = unfinished
    main([*resuming, *HARMLESS, "--ckpt_path", checkpoint(copy)])
    weights = load_file(run / "hf/model.safetensors")
    for name, weight in load_file(copy / "hf/model.safetensors").items():
        assert weight.equal(weights[name]), name


def test_a_run_is_trained_on_from_its_export(unfinished, tmp_path):
    """Here with a rate of 0, after which its weights are those of the export."""
    run, command = unfinished
    export = tmp_path / "exported"
    main(["export", str(run), str(export)])
    options = f"--model.adapter {export} --model.llm {export} --model.learning_rate 0"
    options += f" --model.adapter_learning_rate 0 --trainer.max_steps 1 --out {tmp_path}/new"
    main([*command, *options.split()])
    before = load_file(export / "model.safetensors")
    after = load_file(tmp_path / "new/hf/model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert weight.equal(after[name]), name


def test_a_checkpoint_is_validated_as_the_model_that_it_is_of(
    finished, parts, conversations, tmp_path
):
    run, _ = finished
    options = [*copied_parts(tmp_path, parts, conversations), "--ckpt_path", checkpoint(run)]
    options += ["--data.val_annotations", str(tmp_path / "data/data.json")]
    command = ["validate", *options, "--out", str(tmp_path / "run")]
    main([*command, "--model.learning_rate", "0.5"])
    with pytest.raises(SystemExit, match="belongs to a run with model.image_attention='causal'"):
        main([*command, "--model.image_attention", "bidirectional"])
    replace_encoder(tmp_path)
    with pytest.raises(SystemExit, match="belongs to a run with model.encoder/model.safetensors="):
        main(command)


def test_stage_2_refuses_an_adapter_of_another_encoder(finished, parts, conversations, tmp_path):
    """Of the same shape, as CLIP's and DINOv2's are."""
    run, _ = finished
    command = ["fit", *copied_parts(tmp_path, parts, conversations), "--out", str(tmp_path / "run")]
    command += ["--model.adapter", str(run / "hf")]
    replace_encoder(tmp_path)
    with pytest.raises(SystemExit, match="was trained with another encoder .*safetensors differs"):
        main(command)
    assert not (tmp_path / "run/hf").exists()


# ---------------------------------------------------------------------------------------------------- refusals
REFUSED = {  # options: message
    "--trainer.fast_dev_run true": "fast_dev_run must be False, got .*; for a trial, use",
    "--trainer.overfit_batches 1": "overfit_batches must be 0.0, got .*; for a trial, use",
    "--trainer.limit_train_batches 2": "limit_train_batches must be 1.0, got .*; for a trial, use",
    "--trainer.accumulate_grad_batches 3": "accumulate_grad_batches must be 1, got 3: it follows",
    "--ckpt_path last --overwrite true": "give one of them",
}


@pytest.mark.parametrize("options", REFUSED)
def test_options_that_contradict_each_other_or_the_record_are_refused(
    options, parts, conversations, tmp_path
):
    """A trial would count as finished; micro-batches follow from the data's sizes."""
    with pytest.raises(SystemExit, match=REFUSED[options]):
        tiny_models.fit(parts, conversations, tmp_path / "run", *options.split())
    assert not (tmp_path / "run/hf").exists()


def test_without_a_checkpoint_there_is_nothing_to_validate(finished, tmp_path):
    """The weights before training were validated as if they were the last ones."""
    _, (_, *options) = finished
    with pytest.raises(SystemExit, match="there is no checkpoint in .*run/checkpoints"):
        main(["validate", *options, "--out", str(tmp_path / "run"), "--ckpt_path", "last"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"a finished run \(hf/training.json\); add `--ckpt_path last`.*`--overwrite true`"),
        (["--overwrite", "true", "--model.adapter", "/nowhere"], "/nowhere"),
    ],
)
def test_repeating_a_command_changes_no_byte_of_a_finished_run(finished, options, message):
    run, command = finished
    before = run_bytes(run)
    with pytest.raises(SystemExit, match=message):
        main([*command, *options])
    assert run_bytes(run) == before


def test_a_run_that_replaces_another_and_is_killed_is_not_finished(
    finished, unfinished, monkeypatch
):
    folder, command = unfinished
    with pytest.raises(SystemExit, match="run holds an unfinished run .checkpoints/"):
        main(command)
    shutil.copytree(finished[0] / "hf", folder / "hf")
    with monkeypatch.context() as patch:
        export = "llava_bidir.training.read_checkpoint.export_hf"
        patch.setattr(export, lambda *args: sys.exit("killed"))
        with pytest.raises(SystemExit, match="killed"):
            main([*command, "--overwrite", "true"])
    assert not (folder / "hf").exists()
    assert checkpoint(folder), "one of the new run, none of the other"
    main([*command, "--ckpt_path", "last"])
    assert_same_export(folder / "hf", finished[0] / "hf")
