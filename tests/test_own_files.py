"""`--import FILE.py`: what a file of one's own registers, in every command that meets its names."""

import re
import sys
from pathlib import Path

import probe_runs
import pytest
import tiny_models
from extensions import forgotten
from processes import run_command

import llava_bidir.cli
import probes.cli

pytestmark = pytest.mark.slow  # trains a model, and starts processes that do
MAIN = {"llava-bidir": llava_bidir.cli.main, "probes": probes.cli.main}
OWN = '''
"""A mask (a block per row of the tiny model's 2 x 2 patches), a head, a layout and a callback."""
import torch
from lightning import Callback
from torch import nn

import llava_bidir
import probes
from probes.data.folder import FolderDataset


def rows(is_image):
    """Return one block per row of two patches."""
    number = is_image.cumsum(-1) - 1  # of the image token
    return torch.where(is_image, number.div(2, rounding_mode="floor"), -1)


class Cosine(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.directions = nn.Linear(width, classes, bias=False)

    def forward(self, states):
        normed = nn.functional.normalize(self.directions.weight, dim=-1)
        return 10 * nn.functional.linear(nn.functional.normalize(states, dim=-1), normed)


class Hello(Callback):
    def on_fit_start(self, trainer, module):
        print("hello")


llava_bidir.register_image_attention("rows", rows)
probes.register_head("cosine", lambda width, classes, grid: Cosine(width, classes))
probes.register_dataset("own", FolderDataset)
'''


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("mine") / "own_parts.py"
    file.write_text(OWN)
    return file


@pytest.fixture
def call(own):
    """Return a function that runs a command as a new process would, with the file or without."""

    def run(program: str, *words, with_file: bool = True) -> None:
        with forgotten():
            MAIN[program]([*map(str, words), *(["--import", str(own)] if with_file else ())])

    return run


@pytest.fixture(scope="module")
def trained(own, parts, conversations, tmp_path_factory) -> Path:
    """A run of `fit` under the mask, with the callback, in a process of its own."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = [*tiny_models.training_arguments(parts, conversations), "--model.image_attention"]
    words += ["rows", "--trainer.callbacks+=own_parts.Hello", f"--import={own}", "--out", str(out)]
    # not forked: what Lightning prints depends on who imported it first
    done = run_command([sys.executable, "-m", "llava_bidir", "fit", *words])
    out.with_name("log").write_text(done.stdout + done.stderr)
    return out


def test_a_training_says_its_loss_and_nothing_that_is_known_of_other_libraries(trained):
    """Warnings and advice that no user of `fit` can act on hid the lines of the loss."""
    said = trained.with_name("log").read_text().splitlines()
    assert "hello" in said
    patterns = (
        "hello",
        "Seed set",
        "GPU available",
        "step .* loss",
        "`Trainer.fit` stopped",
        "The trained model is",
        "(adapter|llm) trains: 100%",
    )
    assert not [line for line in said if not re.match("|".join(patterns), line)]


@pytest.mark.parametrize("is_imported", [True, False], ids=["--import", "--trust"])
@pytest.mark.parametrize(
    "command",
    [
        "llava-bidir generate {run}/hf {photo} sky --max-new-tokens 2",
        "llava-bidir export {run} {out}",
        "probes sites {run}/hf",
        "probes mask {run}/hf",
        "probes study rows={run}/hf {data} --arms trained --only solve --model.sites [layer_02] --out {out} "
        "--trainer.accelerator cpu --trainer.devices 2",  # in processes of its own
    ],
)
def test_commands_read_a_model_of_an_own_mask(
    command, is_imported, trained, call, segmentation, tmp_path, capsys
):
    """From the user's file, or from the export alone, on a machine without this file."""
    words = command.format(
        run=trained,
        photo=segmentation / "images/validation/000.png",
        data=segmentation,
        out=tmp_path / "out",
    ).split()
    with pytest.raises(SystemExit) as stop:
        call(*words, with_file=False)
    assert f"image_attention 'rows' is a function in {trained}/hf/attention.py" in str(stop.value)
    assert "allow it: --trust true" in str(stop.value) and "--import FILE.py" in str(stop.value)
    if is_imported:
        call(*words)
    else:
        call(*words, "--trust", "true", with_file=False)
    if words[1] == "sites":
        assert "rows" in capsys.readouterr().out
    if words[1] == "export":
        assert (
            "register_image_attention('rows', rows)" in (tmp_path / "out/attention.py").read_text()
        )


def test_segment_reads_probes_of_an_own_head_and_layout(
    call, own, checkpoints, segmentation, tmp_path
):
    run = tmp_path / "run"
    options = "--model.sites=[layer_02] --model.head cosine --data.dataset own".split()
    words = probe_runs.arguments(checkpoints["causal"], segmentation, run, *options)
    with pytest.raises(SystemExit, match="'(cosine|own)'.* expected one of .*--import FILE.py"):
        call("probes", *words, with_file=False)
    call("probes", *words)
    photo = segmentation / "images/validation/000.png"
    segment = ["segment", run, photo, "--out", tmp_path / "maps"]
    with pytest.raises(SystemExit, match="'cosine'; expected one of .*--import FILE.py"):
        call("probes", *segment, with_file=False)
    call("probes", *segment)
    assert (tmp_path / "maps/000.png").is_file()
    own.write_text(OWN.replace("10 *", "20 *"))  # finished, said the run, and segment read it
    for again in ([*words, "--ckpt_path", "last"], segment):
        with pytest.raises(SystemExit, match="code of own_parts.py='.*', but this run has"):
            call("probes", *again)
    own.write_text(OWN)
