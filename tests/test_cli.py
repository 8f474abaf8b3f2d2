"""Commands: their help, what bad usage answers, and the small ones from end to end."""

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import run_bytes
import tiny_models
from processes import run_command

import llava_bidir.cli
import probes.cli
from llava_bidir.command_options import COMMANDS as OF_TRAINING
from llava_bidir.common.cli import Parser
from probes.config import DataOptions, ModelOptions

HEAVY = ("torch", "transformers", "lightning", "pandas", "sklearn", "matplotlib")
MAIN = {"llava_bidir": llava_bidir.cli.main, "probes": probes.cli.main}


BIDIRECTIONAL = ("--model.image_attention", "bidirectional")


def export_again(run: Path) -> str:
    """Export the checkpoint of a run into RUN/again, check that this equals the run's export, and return its path."""
    (checkpoint,) = (run / "checkpoints").glob("*.ckpt")
    llava_bidir.cli.main(["export", str(checkpoint), str(run / "again")])
    run_bytes.assert_same_export(run / "hf", run / "again")
    return str(checkpoint)


COMMANDS = {
    package: {name: command for group in groups.values() for name, command in group.items()}
    for package, groups in (("llava_bidir", OF_TRAINING), ("probes", probes.cli.commands()))
}
OURS = [  # all but those of LightningCLI
    (package, name, command.options)
    for package, commands in COMMANDS.items()
    for name, command in commands.items()
    if command.options
]


@pytest.mark.parametrize(("package", "command", "options"), OURS)
def test_each_command_has_help_that_explains_every_option(package, command, options, capsys):
    with pytest.raises(SystemExit) as stop:
        MAIN[package]([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage:" in text
    assert len(text) > 200
    assert not [x.dest for x in Parser(options)._actions if not x.help and x.dest not in ("help",)]


HELP_OF_ALL = f"""
HEAVY = {HEAVY}
import importlib, sys
main = importlib.import_module(sys.argv[1] + ".cli").main
for command in sys.argv[2:]:
    sys.argv = ["x", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end
    heavy = [name for name in HEAVY if name in sys.modules]
    assert not heavy, (command, heavy)
"""


@pytest.mark.parametrize("package", COMMANDS)
def test_help_imports_nothing_heavy(package):
    """In a process of its own."""
    ours = [name for x, name, _ in OURS if x == package]
    done = run_command([sys.executable, "-c", HELP_OF_ALL, package, "", *ours])
    assert all(f"  {command} " in done.stdout for command in COMMANDS[package]), "of all at once"


def test_options_of_a_run_are_those_that_lightning_parses(capsys):
    """A field of `config.py` that `ProbeModule` or `ProbeDataModule` did not take would have no effect."""
    with pytest.raises(SystemExit):
        probes.cli.main(["fit", "--help"])
    text = capsys.readouterr().out
    options = {f"model.{field.name}" for field in fields(ModelOptions)}
    options |= {f"data.{field.name}" for field in fields(DataOptions)}
    assert not [name for name in options if f"--{name} " not in text]


def test_missing_records_are_named_before_a_model_is_looked_up(tmp_path):
    """README's command, typed without data, tried to reach the hub for 40 seconds."""
    words = "fit -c stage1 -c clip --model.encoder.path no/encoder"
    words += f" --data.annotations {tmp_path}/none.json --data.images {tmp_path}"
    with pytest.raises(SystemExit, match="data.annotations: no file .*none.json"):
        llava_bidir.cli.main([*words.split(), "--out", str(tmp_path / "run")])


def test_verify_data_shows_what_is_fed(parts, conversations, capsys):
    argv = ["verify-data", *tiny_models.training_arguments(parts, conversations), *BIDIRECTIONAL]
    llava_bidir.cli.main([*argv, "--json", "--show", "0", "11"])
    picture, text = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert picture["id"] == "r0"
    assert picture["template"] == "vicuna_v1"
    ((start, end),) = picture["image_spans"]
    assert end - start == tiny_models.TOKENS
    assert len(set(picture["input_ids"][start:end])) == 1
    assert len(picture["labels"]) == len(picture["input_ids"])
    assert picture["text"].count("<image>") == 1
    assert text["image_spans"] == []
    assert "<image>" not in text["text"]
    llava_bidir.cli.main([*argv, "--show", "0"])
    shown = capsys.readouterr().out
    assert "trained [wall</s>]" in shown
    assert "<4 image tokens>" in shown
    assert [line.split()[2:] for line in shown.splitlines()[-3:]] == [
        ["\\", ".", "."],
        ["#", "#", "."],
        ["#", "#", "\\"],
    ]
    with pytest.raises(SystemExit, match="--show 12: .* has records 0..11"):
        llava_bidir.cli.main([*argv, "--show", "12"])


def test_fit_exports_a_model_that_generate_and_export_agree_on(
    parts,
    conversations,
    tmp_path,
    capsys,
):
    run = tiny_models.fit(
        parts,
        conversations,
        tmp_path / "run",
        *BIDIRECTIONAL,
    )
    facts = json.loads((run / "hf/training.json").read_text())
    assert facts["stage"] == "adapter+llm"
    assert facts["steps"] == 3
    assert 0 <= facts["val/answer_accuracy"] <= 1
    checkpoint = export_again(run)
    for command in ("validate", "test"):  # the checkpoint answers as it did when its training ended
        capsys.readouterr()
        words = [
            command,
            *tiny_models.training_arguments(parts, conversations),
            *BIDIRECTIONAL,
            "--out",
            str(tmp_path / command),
            "--ckpt_path",
            checkpoint,
        ]
        llava_bidir.cli.main(words)
        assert str(facts["val/answer_accuracy"])[:5] in capsys.readouterr().out
    picture = str(conversations / "pictures/0.png")
    capsys.readouterr()
    llava_bidir.cli.main(
        ["generate", str(run / "hf"), picture, "sky", "name the wall", "--max-new-tokens", "3"]
    )
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "sky"
    assert shown[2] == "name the wall"


def test_checkpoint_of_stage_2_is_exported_without_the_model_of_stage_1(
    parts, conversations, tmp_path
):
    def fit(name: str, *more: str) -> Path:
        return tiny_models.fit(
            parts, conversations, tmp_path / name, "--trainer.max_steps", "1", *more
        )

    adapter = fit("stage1", "--model.adapter_init_scale", "4") / "hf"
    run = fit("run", "--model.adapter", str(adapter))
    shutil.rmtree(adapter)
    export_again(run)
    facts = json.loads((run / "again/training.json").read_text())
    assert facts["adapter"] == str(adapter)
    assert facts["adapter_init_scale"] == 4


def test_image_that_goes_missing_ends_training_with_its_record_named(parts, tmp_path):
    """Nothing takes its place."""
    folder = tiny_models.write_conversations(tmp_path)
    (folder / "pictures/3.png").unlink()
    more = "--data.val_annotations null --data.num_workers 1"
    message = r"^llava-bidir: record 3 \(id .r3.\): .*pictures/3.png cannot be read as an image: .*No such file.*"
    with pytest.raises(SystemExit, match=message):
        tiny_models.fit(
            parts,
            folder,
            tmp_path / "run",
            *more.split(),
        )


def test_data_is_loaded_where_processes_are_not_forked_by_default(
    parts,
    conversations,
    tmp_path,
    spawn,
):
    tiny_models.fit(
        parts,
        conversations,
        tmp_path,
        "--data.num_workers",
        "1",
    )
    assert json.loads((tmp_path / "hf/training.json").read_text())["steps"] == 3


def test_tensorboard_has_what_a_run_should_show(parts, conversations, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = "--trainer.log_every_n_steps 1 --throughput.peak_tflops 1"
    tiny_models.fit(
        parts,
        conversations,
        tmp_path,
        *more.split(),
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    of_training = "loss grad_norm supervised_tokens samples_per_s tokens_per_s step_s mfu"
    wanted = {f"train/{name}" for name in of_training.split()}
    wanted |= {"val/loss", "val/answer_accuracy", "lr-AdamW/adapter", "lr-AdamW/llm"}
    assert wanted <= set(tags["scalars"])
    assert "hp_metric" not in tags["scalars"], "Lightning's placeholder, always -1"
    assert any("answers" in tag for tag in tags["tensors"])
