"""`llava-bidir fit` killed at random moments until it finishes: its results equal an undisturbed run bit for bit.

CI kills it once, the nightly job `FAULTS` times.
"""

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
from run_bytes import assert_same_export
from training_runs import points

from llava_bidir.common.runs import last_checkpoint

FAULTS = int(os.environ.get("FAULTS", 4))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch"),
]


def saved_step(out: Path) -> int:
    newest = last_checkpoint(out / "checkpoints")
    return torch.load(newest, weights_only=True)["global_step"] if newest else 0


@pytest.mark.parametrize("faults", [1, pytest.param(FAULTS, marks=pytest.mark.nightly)])
def test_killed_runs_end_as_an_undisturbed_one(faults, parts, conversations, tmp_path):
    """Of ten epochs of three steps, with a checkpoint after each, and validation after epochs four and eight."""
    log = tmp_path / "log"

    def train(name: str) -> None:
        # so that kills also interrupt the reading of conversations
        datasets.config.HF_DATASETS_CACHE = tmp_path / name / "cache"
        more = "--data.micro_batch_size 2 --trainer.log_every_n_steps 1 --ckpt_path last"
        more += " --trainer.max_epochs 10 --trainer.check_val_every_n_epoch 4"
        more += " --checkpoints.every_n_steps 1"
        tiny_models.fit(parts, conversations, tmp_path / name, *more.split())

    start = time.monotonic()
    assert wait(fork(partial(train, "undisturbed"), log)) == 0, log.read_text()
    duration = time.monotonic() - start
    moments = random.Random(faults)
    out = tmp_path / "killed"
    kills = 0
    while kills < faults or (out / "checkpoints").exists():
        before = saved_step(out)
        log.unlink(missing_ok=True)
        share = moments.random() if kills else 0.5  # the first kill hits between checkpoints
        limit = share * duration if kills < faults else 20 * duration
        status = kill_after(limit, fork(partial(train, "killed"), log))
        assert status in (-signal.SIGKILL, 0), log.read_text()
        assert saved_step(out) >= before, "a checkpoint is never lost"
        if status:
            kills += 1
            continue
        assert_same_export(out / "hf", tmp_path / "undisturbed/hf")
        for tag in ("train/loss", "val/loss"):
            assert points(out, tag) == points(tmp_path / "undisturbed", tag)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("function", "saved"),
    [
        ("training.module.LlavaTraining.answer", 2),  # an epoch is saved after its validation
        ("model.export.write_card", 3),
    ],
)
def test_a_run_killed_in_validation_or_export_ends_as_an_undisturbed_one(
    function, saved, parts, conversations, tmp_path, monkeypatch
):
    """It is resumed from the checkpoint before."""
    log = tmp_path / "log"
    more = "--ckpt_path last --checkpoints.every_n_steps 1 --model.lora.r 2".split()
    more += "--model.frozen_dtype bfloat16 --trainer.precision bf16-mixed".split()
    # what is logged of a window depends on its first step
    more += "--trainer.gradient_clip_val null --trainer.log_every_n_steps 1".split()

    def train(name: str) -> int:
        run = partial(tiny_models.fit, parts, conversations, tmp_path / name, *more)
        return wait(fork(run, log))

    assert train("undisturbed") == 0, log.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(f"llava_bidir.{function}", die)
        assert train("killed") == -signal.SIGKILL
    assert not (tmp_path / "killed/hf").exists()
    assert saved_step(tmp_path / "killed") == saved
    assert train("killed") == 0, log.read_text()
    assert_same_export(tmp_path / "killed/hf", tmp_path / "undisturbed/hf")
