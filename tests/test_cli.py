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


def test_what_fit_exports_is_validated_and_answers_without_the_model_of_stage_1(
    parts, conversations, tmp_path, capsys
):
    def fit(name: str, *more: str) -> Path:
        return tiny_models.fit(
            parts,
            conversations,
            tmp_path / name,
            *BIDIRECTIONAL,
            *more,
        )

    adapter = (
        fit(
            "1",
            "--model.adapter_init_scale",
            "4",
            "--trainer.max_steps",
            "1",
        )
        / "hf"
    )
    run = fit("2", "--model.adapter", str(adapter))
    shutil.rmtree(adapter)
    facts = json.loads((run / "hf/training.json").read_text())
    assert (facts["stage"], facts["steps"]) == ("adapter+llm", 3)
    assert (facts["adapter"], facts["adapter_init_scale"]) == (str(adapter), 4)
    assert 0 <= facts["val/answer_accuracy"] <= 1
    (checkpoint,) = map(str, (run / "checkpoints").glob("*.ckpt"))
    llava_bidir.cli.main(["export", checkpoint, str(run / "again")])
    run_bytes.assert_same_export(run / "hf", run / "again")
    words = [*tiny_models.training_arguments(parts, conversations), *BIDIRECTIONAL]
    words += ["--out", str(tmp_path / "validate"), "--ckpt_path", checkpoint]
    capsys.readouterr()
    llava_bidir.cli.main(["validate", *words])
    assert str(facts["val/answer_accuracy"])[:5] in capsys.readouterr().out
    words = ["generate", str(run / "hf"), str(conversations / "pictures/0.png")]
    llava_bidir.cli.main([*words, "sky", "name the wall", "--max-new-tokens", "3"])
    assert capsys.readouterr().out.splitlines()[::2] == ["sky", "name the wall"]


def test_image_that_goes_missing_ends_training_with_its_record_named(parts, tmp_path):
    """Nothing takes its place."""
    folder = tiny_models.write_conversations(tmp_path)
    (folder / "pictures/3.png").unlink()
    more = "--data.val_annotations null --data.num_workers 1".split()
    message = r"^llava-bidir: record 3 \(id .r3.\): .*pictures/3.png cannot be read as an image: .*No such file.*"
    with pytest.raises(SystemExit, match=message):
        tiny_models.fit(
            parts,
            folder,
            tmp_path / "run",
            *more,
        )
