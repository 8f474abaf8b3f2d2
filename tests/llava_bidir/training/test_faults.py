"""`llava-bidir fit` killed at random moments until it ends: the result is that of an undisturbed run, bit for bit.

CI kills a few times. `FAULTS=100 python -m pytest -s -m slow tests/llava_bidir/training/test_faults.py` does a hundred.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import datasets
import pytest
import tiny_models
import torch
from processes import fork, kill_after, wait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir import cli
from llava_bidir.common.atomic_io import PARTIAL
from llava_bidir.common.checkpoint_io import AtomicCheckpointIO, latest_valid_checkpoint

FAULTS = int(os.environ.get("FAULTS", 4))
CLOCK = ("samples_per_s", "tokens_per_s", "tflops_per_s_and_device", "step_s", "data_share")  # what time decides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch"),
]


@pytest.fixture(scope="module")
def train(parts, conversations):
    """A function that makes a run in a folder, or goes on with it: ten epochs of three steps, with a checkpoint after
    each step but the last of an epoch, validated after the fourth epoch and the eighth."""

    def run(out: Path) -> None:
        datasets.config.HF_DATASETS_CACHE = out / "cache"  # so that reading the conversations is cut short, too
        cli.main(
            [
                *("fit", *tiny_models.training_arguments(parts, conversations), "--data.micro_batch_size", "2"),
                *("--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "4"),
                *("--trainer.log_every_n_steps", "1", "--trainer.callbacks+=ModelCheckpoint"),
                *("--trainer.callbacks.save_last=true", "--trainer.callbacks.every_n_train_steps=1"),
                *("--out", str(out), "--ckpt_path", "last"),
            ]
        )

    return run


def results(out: Path) -> dict[str, bytes]:
    """The files of hf/, without what the clock decides."""
    found = {file.name: file.read_bytes() for file in (out / "hf").iterdir()}
    facts = json.loads(found.pop("training.json"))
    found.pop("README.md")  # has the same facts
    return found | {"facts": {k: v for k, v in facts.items() if k.rpartition("/")[2] not in CLOCK}}


def curves(out: Path) -> dict[tuple[str, int], set[float]]:
    """By metric and step: the values in TensorBoard, several where a step was repeated after a kill."""
    points = {}
    for file in out.glob("events.out.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.rpartition("/")[2] not in CLOCK:
                for event in events.Scalars(tag):
                    points.setdefault((tag, event.step), set()).add(event.value)
    return points


def saved_step(out: Path) -> int:
    newest = latest_valid_checkpoint(out / "checkpoints")
    return torch.load(newest, weights_only=True)["global_step"] if newest else 0


def test_killed_runs_end_as_an_undisturbed_one(train, tmp_path):
    start, log = time.monotonic(), tmp_path / "log"
    assert wait(fork(lambda: train(tmp_path / "undisturbed"), log)) == 0, log.read_text()
    duration = time.monotonic() - start
    expected, points = results(tmp_path / "undisturbed"), curves(tmp_path / "undisturbed")

    moments, out = random.Random(FAULTS), tmp_path / "killed"
    kills = runs = in_writing = 0
    while kills < FAULTS or (out / "checkpoints").exists():
        before = saved_step(out)
        log.unlink(missing_ok=True)
        child = fork(lambda: train(out), log)
        status = kill_after(moments.uniform(0, duration) if kills < FAULTS else 20 * duration, child)
        assert status in (-signal.SIGKILL, 0), log.read_text()
        assert saved_step(out) >= before, "a checkpoint is never lost"
        if status:
            kills += 1
            in_writing += any(out.rglob("*" + PARTIAL))
            continue
        runs += 1
        assert results(out) == expected
        for point, values in curves(out).items():
            assert values == points[point], point
        shutil.rmtree(out)
    print(
        f"\n{kills} kills, {in_writing} of them in the middle of a file; {runs} runs ended, all as the undisturbed one"
    )


@pytest.mark.parametrize("moment", ["validation", "export"])
def test_a_run_killed_behind_its_last_step_is_validated_and_exported(
    moment, parts, conversations, tmp_path, monkeypatch
):
    """With Lightning's own checkpoint at the end of each epoch, from where there is nothing left to train."""

    def train(out: Path, killed: bool = False) -> int:
        def run():
            if killed:
                name = {"validation": "training.module.LlavaTraining.answer", "export": "export._compare"}[moment]
                monkeypatch.setattr("llava_bidir." + name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            arguments = tiny_models.training_arguments(parts, conversations)
            more = ("--trainer.log_every_n_steps", "1", "--out", str(out), "--ckpt_path", "last")
            cli.main(["fit", *arguments, *more])

        return wait(fork(run, tmp_path / "log"))

    assert train(tmp_path / "undisturbed") == 0, (tmp_path / "log").read_text()
    assert train(tmp_path / "killed", killed=True) == -signal.SIGKILL
    assert not (tmp_path / "killed/hf").exists()
    assert train(tmp_path / "killed") == 0, (tmp_path / "log").read_text()
    whole, resumed = results(tmp_path / "undisturbed"), results(tmp_path / "killed")
    resumed["facts"].pop("checkpoint", None)  # which it was exported from
    assert resumed == whole and "val/answer_accuracy" in whole["facts"]


def test_no_checkpoint_is_in_the_middle_of_a_step(train, tmp_path):
    """Also not at the first micro-batch after a resume, where the number of steps is still that of the checkpoint."""

    def watched(out: Path):
        save = AtomicCheckpointIO.save_checkpoint

        def noted(self, checkpoint, path, storage_options=None):
            save(self, checkpoint, path)
            with (tmp_path / "positions").open("a") as file:
                file.write(f"{checkpoint['loops']['fit_loop']['epoch_loop.batch_progress']['current']['processed']}\n")

        AtomicCheckpointIO.save_checkpoint = noted
        train(out)

    child = fork(lambda: watched(tmp_path / "run"), tmp_path / "log")
    while not (tmp_path / "positions").exists():
        time.sleep(0.001)
    assert kill_after(0, child) == -signal.SIGKILL
    assert wait(fork(lambda: watched(tmp_path / "run"), tmp_path / "log")) == 0
    positions = [int(line) for line in (tmp_path / "positions").read_text().split()]
    assert len(positions) > 10 and not any(position % 2 for position in positions), "two micro-batches a step"
