"""What users see in the terminal: short usage errors, one line after Ctrl-C, progress in logs, no advertisements."""

import re
import subprocess
import sys

import pytest
import tiny_models
from lightning import Callback

import llava_bidir.cli
import probes.cli
from llava_bidir.common.short_help import format_help

MODEL_AND_DATA = "--model.mllm DIR --data.root DIR"
RECORDS = "--data.annotations FILE --data.images DIR"
PAGES = {"llava-bidir": llava_bidir.cli.HELP, "probes": probes.cli.HELP}
PROGRAMS = {"llava-bidir": llava_bidir.cli.main, "probes": probes.cli.main}


@pytest.mark.parametrize(
    ("command", "message", "meant"),
    [
        (
            "probes fit --model.mlm DIR",
            "probes fit: unrecognized arguments: --model.mlm",
            "--model.mllm",
        ),
        (f"probes fit {MODEL_AND_DATA} --model.learning_rate fast", "Got value: fast", None),
        (
            "probes fit -c configs/probes/folder.yaml",
            "are required: --model.mllm, --data.root",
            None,
        ),
        (
            "probes solve -c ade20k --model.mllm DIR",
            "probes solve: the following arguments are required",
            None,
        ),
        (
            "llava-bidir fit -c stage2 -c clip",
            "are required: --data.annotations, --data.images",
            None,
        ),
        ("probes fitt", "invalid choice: 'fitt'", "fit"),
        (
            "probes maps --probes RUN --image 0 --outt DIR",
            "unrecognized arguments: --outt DIR",
            "--out",
        ),
        (
            "llava-bidir fit --model.image_atention causal",
            "--model.image_atention",
            "--model.image_attention",
        ),
        ("llava-bidir exprt", "invalid choice: 'exprt'", "export"),
        ("llava-bidir export CKPT OUT --as-lava", "llava-bidir export: unrecognized", "--as-llava"),
        ("probes lab RUN --fly 1", "probes lab: unrecognized arguments: --fly 1", None),
        (
            f"probes solve {MODEL_AND_DATA} --pass 8",
            "probes solve: unrecognized arguments: --pass 8",
            None,
        ),
        ("probes verify-data --worker 2", "probes verify-data: ", None),
        (
            f"llava-bidir inspect -c stage2 -c clip {RECORDS} --index one",
            "argument --index: invalid int value",
            None,
        ),
    ],
)
def test_usage_errors_have_three_lines_and_say_what_was_meant(
    command,
    message,
    meant,
    capsys,
):
    program, *arguments = command.split()
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program](arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in lines[0] and lines[0].startswith(program)
    assert lines[1:-1] == ([f"did you mean {meant}?"] if meant else [])
    is_short = arguments[0] in PAGES[program]
    option = "--help-all" if is_short else "--help"
    assert lines[-1] == f"All options: {lines[0].partition(':')[0]} {option}"


class Interrupt(Callback):
    """Ctrl-C in the first step."""

    def on_train_batch_start(self, *args):
        raise KeyboardInterrupt


def test_ctrl_c_ends_with_one_line_and_status_130(
    parts,
    conversations,
    tmp_path,
    monkeypatch,
    capsys,
):
    command = ["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        llava_bidir.cli.main([*command, "--trainer.callbacks+", f"{__name__}.Interrupt"])
    assert stop.value.code == 130
    line = "llava-bidir: interrupted; nothing was saved yet: the same command starts anew"
    assert capsys.readouterr().err.splitlines()[-1] == line

    monkeypatch.setattr("probes.analyses.extract.print_sites", Interrupt().on_train_batch_start)
    monkeypatch.setattr("probes.training.solve.command.main", Interrupt().on_train_batch_start)
    for command, promise in (("sites MLLM", " to go on"), (f"solve {MODEL_AND_DATA}", "")):
        with pytest.raises(SystemExit) as stop:
            probes.cli.main(command.split())
        assert stop.value.code == 130
        assert (
            capsys.readouterr().err == f"probes: interrupted; run the same command again{promise}\n"
        )


@pytest.mark.slow
def test_a_log_has_progress_and_nothing_that_is_not_about_the_run(
    checkpoints, segmentation, tmp_path
):
    """The DataLoader's, the logging interval's and the model table's messages were about our own settings."""
    command = [
        "fit",
        "-c",
        "configs/probes/folder.yaml",
        "--model.mllm",
        str(checkpoints["causal"]),
    ]
    command += [
        "--data.root",
        str(segmentation),
        "--trainer.max_epochs",
        "2",
        "--out",
        str(tmp_path),
    ]
    command += ["--trainer.accelerator", "cpu", "--data.batch_size", "3", "--data.num_workers", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "probes", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [
        line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line
    ]
    assert done.stdout == ""
    expected = [r"Seed set to 0", r"GPU available: \w+, used: False"]
    expected += [
        rf"step {2 * i} of 4, epoch {i}/2, batch 2/2, loss [\d.]+, [\d.]+ batches/s, 0:00:\d\d left"
        for i in (1, 2)
    ]
    expected += [r"`Trainer.fit` stopped: `max_epochs=2` reached.", rf"{tmp_path}: mIoU encoder .*"]
    for line in lines:
        assert any(re.fullmatch(text, line) for text in expected), line
    assert len(lines) == len(expected)


@pytest.mark.parametrize("program", PAGES)
def test_no_option_runs_into_its_text(program):
    """`--model.image_attention NAMEmask among image tokens`."""
    for command, page in PAGES[program].items():
        for name, text in page.options.items():
            assert f"  {name} " in format_help(command, page), f"{command}: {name}{text[:10]}"
