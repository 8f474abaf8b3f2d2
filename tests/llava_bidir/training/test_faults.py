"""`llava-bidir fit` killed at random moments until it finishes: its results equal an undisturbed run bit for bit.

CI kills it a few times, `FAULTS=100 python -m pytest -s -m slow tests/llava_bidir/training/test_faults.py` a hundred.
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
from llava_bidir.training.throughput import TIMING_METRICS

FAULTS = int(os.environ.get("FAULTS", 4))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch"),
]


@pytest.fixture(scope="module")
def train(parts, conversations):
    """Return a function that starts or resumes a run of ten epochs of three steps in a folder.

    It saves a checkpoint after each step except the last of an epoch, and validates after epochs four and eight.
    """

    def run(out: Path) -> None:
        # So that kills also interrupt the reading of conversations
        datasets.config.HF_DATASETS_CACHE = out / "cache"
        cli.main(
            [
                *(
                    "fit",
                    *tiny_models.training_arguments(parts, conversations),
                    "--data.micro_batch_size",
                    "2",
                ),
                *("--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "4"),
                *("--trainer.log_every_n_steps", "1", "--trainer.callbacks+=ModelCheckpoint"),
                *(
                    "--trainer.callbacks.save_last=true",
                    "--trainer.callbacks.every_n_train_steps=1",
                ),
                *("--out", str(out), "--ckpt_path", "last"),
            ]
        )

    return run


def results(out: Path) -> dict[str, bytes]:
    """Return the files of hf/."""
    files = {file.name: file.read_bytes() for file in (out / "hf").iterdir()}
    return files | {"training.json": json.loads(files["training.json"])}


def curves(out: Path) -> dict[tuple[str, int], set[float]]:
    """Return the values in TensorBoard by metric and step; a step repeated after a kill may have several."""
    points = {}
    for file in out.glob("events.out.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            if tag.rpartition("/")[2] not in TIMING_METRICS:
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
        status = kill_after(
            moments.uniform(0, duration) if kills < FAULTS else 20 * duration, child
        )
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
def test_a_run_killed_after_its_last_step_is_validated_and_exported(
    moment, parts, conversations, tmp_path, monkeypatch
):
    """It resumes from Lightning's checkpoint at the end of the epoch, after which no step is left.

    The export is then made from the checkpoint.
    """

    def train(out: Path, killed: bool = False) -> int:
        def run():
            if killed:
                name = {
                    "validation": "training.module.LlavaTraining.answer",
                    "export": "model.hf_export._compare_weights",
                }[moment]
                monkeypatch.setattr(
                    "llava_bidir." + name, lambda *_: os.kill(os.getpid(), signal.SIGKILL)
                )
            arguments = tiny_models.training_arguments(parts, conversations)
            more = ("--trainer.log_every_n_steps", "1", "--out", str(out), "--ckpt_path", "last")
            light = (
                "--model.lora.r=2",
                "--model.frozen_dtype=bfloat16",
                "--trainer.precision=bf16-mixed",
            )
            cli.main(["fit", *arguments, *more, *light, "--trainer.gradient_clip_val=null"])

        return wait(fork(run, tmp_path / "log"))

    assert train(tmp_path / "undisturbed") == 0, (tmp_path / "log").read_text()
    assert train(tmp_path / "killed", killed=True) == -signal.SIGKILL
    assert not (tmp_path / "killed/hf").exists()
    assert train(tmp_path / "killed") == 0, (tmp_path / "log").read_text()
    undisturbed, resumed = results(tmp_path / "undisturbed"), results(tmp_path / "killed")
    resumed["training.json"].pop("checkpoint", None)  # the path it was exported from
    assert resumed == undisturbed and "val/answer_accuracy" in undisturbed["training.json"]


def test_no_checkpoint_is_in_the_middle_of_a_step(train, tmp_path):
    """Nor at the first micro-batch after a resume, when the number of steps still equals the checkpoint's."""

    def recorded(out: Path):
        save = AtomicCheckpointIO.save_checkpoint

        def save_and_record(self, checkpoint, path, storage_options=None):
            save(self, checkpoint, path)
            with (tmp_path / "positions").open("a") as file:
                file.write(
                    f"{checkpoint['loops']['fit_loop']['epoch_loop.batch_progress']['current']['processed']}\n"
                )

        AtomicCheckpointIO.save_checkpoint = save_and_record
        train(out)

    child = fork(lambda: recorded(tmp_path / "run"), tmp_path / "log")
    while not (tmp_path / "positions").exists():
        time.sleep(0.001)
    assert kill_after(0, child) == -signal.SIGKILL
    assert wait(fork(lambda: recorded(tmp_path / "run"), tmp_path / "log")) == 0
    positions = [int(line) for line in (tmp_path / "positions").read_text().split()]
    assert len(positions) > 10 and not any(position % 2 for position in positions), (
        "two micro-batches a step"
    )
