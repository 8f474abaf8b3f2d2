"""`llava-bidir fit` killed at random moments until it finishes: its results equal an undisturbed run bit for bit.

CI kills it once, the nightly job `FAULTS` times.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
import tiny_models
import torch
from processes import die, fork, kill_after, wait
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.common.checkpoints import AtomicCheckpointIO
from llava_bidir.common.runs import last_checkpoint
from llava_bidir.training.throughput import TIMING_METRICS

FAULTS = int(os.environ.get("FAULTS", 4))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch"),
]


@pytest.fixture(scope="module")
def train(parts, conversations):
    """Return a function that starts or resumes a run of ten epochs of three steps in a folder.

    It saves a checkpoint after each step, and validates after epochs four and eight.
    """

    def run(out: Path) -> None:
        # So that kills also interrupt the reading of conversations
        datasets.config.HF_DATASETS_CACHE = out / "cache"
        more = "--data.micro_batch_size 2 --trainer.log_every_n_steps 1 --ckpt_path last"
        more += " --trainer.max_epochs 10 --trainer.check_val_every_n_epoch 4"
        more += " --checkpoints.every_n_steps 1"
        tiny_models.fit(parts, conversations, out, *more.split())

    return run


def results(out: Path) -> dict[str, object]:
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
    newest = last_checkpoint(out / "checkpoints")
    return torch.load(newest, weights_only=True)["global_step"] if newest else 0


@pytest.mark.parametrize("faults", [1, pytest.param(FAULTS, marks=pytest.mark.nightly)])
def test_killed_runs_end_as_an_undisturbed_one(faults, train, tmp_path):
    log = tmp_path / "log"
    start = time.monotonic()
    assert wait(fork(lambda: train(tmp_path / "undisturbed"), log)) == 0, log.read_text()
    duration = time.monotonic() - start
    expected = results(tmp_path / "undisturbed")
    points = curves(tmp_path / "undisturbed")

    moments = random.Random(faults)
    out = tmp_path / "killed"
    kills = 0
    while kills < faults or (out / "checkpoints").exists():
        before = saved_step(out)
        log.unlink(missing_ok=True)
        share = moments.random() if kills else 0.5  # the first kill hits between checkpoints
        limit = share * duration if kills < faults else 20 * duration
        status = kill_after(limit, fork(lambda: train(out), log))
        assert status in (-signal.SIGKILL, 0), log.read_text()
        assert saved_step(out) >= before, "a checkpoint is never lost"
        if status:
            kills += 1
            continue
        assert results(out) == expected
        for point, values in curves(out).items():
            assert values == points[point], point
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "function",
    ["training.module.LlavaTraining.answer", "model.export._compare_weights"],
    ids=["validation", "export"],
)
def test_a_run_killed_after_its_last_step_is_validated_and_exported(
    function,
    parts,
    conversations,
    tmp_path,
    monkeypatch,
):
    """It is resumed from the checkpoint of the final step, if there is one."""
    log = tmp_path / "log"
    more = "--trainer.log_every_n_steps 1 --ckpt_path last --model.lora.r 2"
    more += " --model.frozen_dtype bfloat16 --trainer.precision bf16-mixed"
    more += " --trainer.gradient_clip_val null"

    def train(name: str) -> int:
        out = tmp_path / name
        run = partial(tiny_models.fit, parts, conversations, out, *more.split())
        return wait(fork(run, log))

    assert train("undisturbed") == 0, log.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(f"llava_bidir.{function}", die)
        assert train("killed") == -signal.SIGKILL
    assert not (tmp_path / "killed/hf").exists()
    assert train("killed") == 0, log.read_text()
    undisturbed = results(tmp_path / "undisturbed")
    assert results(tmp_path / "killed") == undisturbed
    assert "val/answer_accuracy" in undisturbed["training.json"]


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
