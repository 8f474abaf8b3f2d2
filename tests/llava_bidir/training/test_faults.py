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
import traceback
from pathlib import Path

import datasets
import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir import cli
from llava_bidir.training.checkpoints import newest_whole
from llava_bidir.writing import PARTIAL

FAULTS = int(os.environ.get("FAULTS", 6))
CLOCK = ("samples_per_s", "tokens_per_s", "tflops_per_s_and_device", "step_s", "data_share")  # what time decides

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch"),
]


def fork(run, log: Path) -> int:
    """The id of a process that runs `run` and ends with 0, or with 1 if it raises; what it says goes to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_after(seconds: float, child: int) -> int | None:
    """The child's exit status; None if it was killed, which happens unless it ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


@pytest.fixture(scope="module")
def train(parts, conversations):
    """A function that makes a run in a folder, or goes on with it: 30 optimizer steps, each with a checkpoint."""

    def run(out: Path) -> None:
        datasets.config.HF_DATASETS_CACHE = out / "cache"  # so that reading the conversations is cut short, too
        cli.main(
            [
                *("fit", *tiny.training_arguments(parts, conversations), "--data.micro_batch_size", "2"),
                *("--trainer.max_epochs", "10", "--trainer.check_val_every_n_epoch", "5"),
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
    newest = newest_whole(out / "checkpoints")
    return torch.load(newest, weights_only=True)["global_step"] if newest else 0


def test_killed_runs_end_as_an_undisturbed_one(train, tmp_path):
    start, log = time.monotonic(), tmp_path / "log"
    assert os.waitpid(fork(lambda: train(tmp_path / "undisturbed"), log), 0)[1] == 0, log.read_text()
    duration = time.monotonic() - start
    expected, points = results(tmp_path / "undisturbed"), curves(tmp_path / "undisturbed")

    moments, out = random.Random(FAULTS), tmp_path / "killed"
    kills = runs = in_writing = repeated = 0
    while kills < FAULTS or (out / "checkpoints").exists():
        before = saved_step(out)
        log.unlink(missing_ok=True)
        child = fork(lambda: train(out), log)
        status = kill_after(moments.uniform(0, duration) if kills < FAULTS else 20 * duration, child)
        assert status in (None, 0), log.read_text()
        assert saved_step(out) >= before, "a checkpoint is never lost"
        if status is None:
            kills += 1
            in_writing += any(out.rglob("*" + PARTIAL))
            continue
        runs += 1
        assert results(out) == expected
        for point, values in curves(out).items():
            assert values == points[point], point
            repeated += 1
        shutil.rmtree(out)
    print(
        f"\n{kills} kills, {in_writing} of them in the middle of a file; {runs} runs ended, all as the undisturbed one"
    )
