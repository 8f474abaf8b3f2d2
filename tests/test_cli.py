"""Commands: their help, what bad usage answers, and the small ones from end to end."""

import json
import re
import shutil
import sys
from argparse import SUPPRESS
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
from llava_bidir.common.errors import UserError
from llava_bidir.common.lightning_cli import RunCLI
from llava_bidir.training.cli import build_cli as build_training
from probes.compute.machine import build_machine
from probes.config import DataOptions, ModelOptions
from probes.fit.cli import build_cli as build_probes

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


def lightning_options(build, monkeypatch) -> list:
    """Return the options of `fit` of a LightningCLI but those that are linked, which have no words."""
    parsers = []

    def stop(cli, parser, args):
        parsers.append(parser)
        sys.exit()

    monkeypatch.setattr(RunCLI, "parse_arguments", stop)
    with pytest.raises(SystemExit):
        build([])
    actions = parsers[0]._subcommands_action.choices["fit"]._actions
    return [action for action in actions if action.default != SUPPRESS]


WITHOUT_RANGE = {
    "model.encoder.layer": "may count from the last; the checkpoint says how many there are",
    "data.options": "the layout's own, see its class",
    "trainer": "Lightning's, which checks them: test_run_that_cannot_train_is_one_line",
}


def test_every_option_that_is_a_number_has_a_range(monkeypatch):
    """`batch_size 0`, `learning_rate nan` and nine others ended in tracebacks."""
    actions = [action for _, _, options in OURS for action in Parser(options)._actions]
    for build in (build_training, build_probes):
        actions += lightning_options(build, monkeypatch)
    numbers = set()
    for action in actions:
        kind = re.sub(r"Literal\[.*?\]", "", str(getattr(action, "_typehint", action.type)))
        if re.search(r"\b(int|float)\b", kind):
            numbers.add(re.sub(r"^trainer\..*", "trainer", action.dest))
    assert numbers == {*WITHOUT_RANGE}


OUT_OF_RANGE = {
    "llava-bidir fit -c demo/stage2": """--data.batch_size 0; --data.num_workers -1; --checkpoints.every_n_steps 0;
        --model.betas [0.9,1.0]; --model.max_new_tokens 0; --seed_everything -3; --seed_everything 100000000000;
        --model.learning_rate inf; --model.learning_rate nan; --throughput.peak_tflops 0""",
    "llava-bidir verify-data -c demo/stage2": "--data.batch_size 0; --data.num_workers -1",
    "llava-bidir generate m p q": "--max_new_tokens 0",
    "probes fit": "--data.batch_size -2; --data.num_workers -1; --model.learning_rate -1; --model.image_px 0",
    "probes solve": """--data.batch_size 0; --data.num_workers -1; --seed_everything -3; --solver.folds 1;
        --solver.strengths 0; --solver.strengths inf; --solver.memory_gb nan; --model.draw -1""",
    "probes verify-data": "--data.num_workers -1; --workers -1",
    "probes lab": "--port 65536",
}


@pytest.mark.parametrize(
    ("start", "option"),
    [(start, option) for start, more in OUT_OF_RANGE.items() for option in more.split(";")],
)
def test_number_out_of_range_is_one_line(start, option, capsys):
    package, *words = [*start.split(), *option.split()]
    with pytest.raises(SystemExit) as stop:
        MAIN[package.replace("-", "_")](words)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert option.split()[0].strip("-") in line
    assert "does not conform to restriction" in line
    assert "Union" not in line


@pytest.mark.parametrize(
    "option",
    [
        "--model.trainable []",
        "--trainer.accelerator tpu",
        "--trainer.devices 0",
        "--trainer.val_check_interval 0",
        "--trainer.check_val_every_n_epoch 0",
    ],
)
def test_run_that_cannot_train_is_one_line(option, parts, conversations, tmp_path):
    with pytest.raises(SystemExit, match=r"^llava-bidir: (trainer|model.trainable).*"):
        tiny_models.fit(parts, conversations, tmp_path, *option.split())


@pytest.mark.parametrize("option", [{"accelerator": "tpu"}, {"devices": 0}, {"num_nodes": 0}])
def test_machine_that_cannot_be_built_is_one_line(option):
    with pytest.raises(UserError, match="^trainer: "):
        build_machine({"accelerator": "cpu"} | option)


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
        return tiny_models.fit(parts, conversations, tmp_path / name, *BIDIRECTIONAL, *more)

    adapter = (
        fit(
            "1",
            "--model.adapter_init_scale",
            "4",
            "--trainer.max_steps",
            "1",
            "--trainer.log_every_n_steps",
            "0",
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
        tiny_models.fit(parts, folder, tmp_path / "run", *more)
