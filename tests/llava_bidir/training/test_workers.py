"""A data worker that dies, for want of memory say: the run ends, and goes on from its last checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from llava_bidir.data.batch_samplers import BatchSampler
from llava_bidir.data.instruction_dataset import Instructions

ROOT = Path(__file__).parents[3]

DYING = """
import os, signal
from llava_bidir.data import instructions
from llava_bidir.cli import main

whole = instructions.Instructions.__getitem__

def deadly(self, index):
    if self.records[index]["id"] == os.environ.get("DEADLY"):
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, index)

instructions.Instructions.__getitem__ = deadly
main()
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_and_loses_no_checkpoint(parts, conversations, tmp_path):
    save = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=1"
    argv = ["fit", *tiny_models.training_arguments(parts, conversations), "--data.num_workers", "1", *save.split()]
    argv += ["--data.group_by_length", "false", "--data.batch_size", "1", "--data.micro_batch_size", "1"]
    argv += ["--out", str(tmp_path), "--ckpt_path", "last"]

    def run(deadly: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"DEADLY": deadly, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", DYING, *argv]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)

    records = Instructions(conversations / "data.json", conversations)
    (ninth,) = list(BatchSampler(records.lengths(), 1, 1, seed=0))[8]  # of twelve
    died = run(records.records[ninth]["id"])
    assert died.returncode not in (0, -signal.SIGKILL), "the worker died, and the run with it"
    assert "killed by signal" in died.stderr and not (tmp_path / "hf").exists()
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    went_on = run("")
    assert went_on.returncode == 0, went_on.stderr[-2000:]
    assert f"resuming {checkpoint}" in went_on.stderr and (tmp_path / "hf/model.safetensors").is_file()
