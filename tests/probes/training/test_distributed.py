"""Runs on several processes, and killed and resumed runs, give the probes and scores of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
from PIL import Image
from processes import HANGING_S
from safetensors.torch import load_file

from llava_bidir.common.checkpoint_io import latest_valid_checkpoint
from probes.cli import main

TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
# Epochs have three steps, and every second step is saved unless it ends an epoch: (hook, step of death, saved step)
DEATHS = {
    "a step after a checkpoint": ("on_train_batch_end", 5, 4),
    "validation": ("on_validation_start", 6, 4),
}
KILLER = """
import os, signal
from lightning import Callback

class Killer(Callback):
    def {hook}(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == ({rank}, {step}):
            os.kill(os.getpid(), signal.SIGKILL)
"""
KILLING = """
trainer:
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {save_last: true, every_n_train_steps: 2}
  - class_path: killer.Killer
"""


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Seven training images, of very different labelled area, and five for validation: neither divides by two."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("uneven"), training=7)
    for i, path in enumerate(sorted((root / "annotations/training").glob("*.png"))):
        mask = np.array(Image.open(path))
        mask[3 * i + 2 :] = 255
        Image.fromarray(mask).save(path)
    return root


def arguments(checkpoint, root, out, *more: str) -> list[str]:
    """Three epochs of three steps; the last batch of an epoch has one image."""
    three = [
        "--trainer.max_epochs",
        "3",
        "--data.batch_size",
        "3",
        "--data.cache_features",
        "false",
    ]
    three += ["--model.feature_norm", "batchnorm", "--model.head", "conv"]
    return probe_runs.arguments(checkpoint, root, out, *three, *more)


def processes(
    arguments: list[str], fails: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "probes", *arguments]
    one_thread = {
        "OMP_NUM_THREADS": "1"
    }  # as in this process: sums depend on the number of threads
    env = os.environ | one_thread | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANGING_S, env=env)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done


def killed(
    run: list[str], folder: Path, hook: str, step: int, rank: int = 0
) -> subprocess.CompletedProcess:
    """The run, in which a rank is killed; checkpoints are saved on the way."""
    (folder / "killer.py").write_text(KILLER.format(hook=hook, step=step, rank=rank))
    (folder / "killing.yaml").write_text(KILLING)
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    return processes([*run, "-c", str(folder / "killing.yaml")], fails=True, PYTHONPATH=path)


@pytest.fixture(scope="module")
def one(checkpoints, uneven, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    main(arguments(checkpoints["causal"], uneven, out))
    return out


@pytest.mark.distributed
@pytest.mark.parametrize("cache", ["false", "true"])
def test_two_processes_train_and_score_as_one(one, cache, checkpoints, uneven, tmp_path):
    """Masks differ in labelled area, and in the last batch one rank has no image."""
    processes(
        arguments(checkpoints["causal"], uneven, tmp_path, *TWO, "--data.cache_features", cache)
    )
    same_probes(one, tmp_path, rtol=1e-3, atol=1e-4)
    alone = metrics(one)
    together = metrics(tmp_path)
    assert together["images"] == 5
    assert alone["probe"] == together["probe"]
    for a, b in zip(alone["sites"], together["sites"], strict=True):
        assert a["history"] == pytest.approx(b["history"], abs=0.005)
        assert a["pacc"] == pytest.approx(b["pacc"], abs=0.005)


@pytest.mark.distributed
def test_the_first_process_decides_for_both_what_is_resumed(one, checkpoints, uneven, tmp_path):
    """Checksums are read once, and no process resumes another checkpoint than the first."""
    shutil.copytree(one, tmp_path / "run")
    run = arguments(checkpoints["causal"], uneven, tmp_path / "run", *TWO, "--ckpt_path", "last")
    log = processes(run).stderr
    assert log.count("resuming ") == 1
    assert log.count("this run is finished; nothing to do") == 1
    log = processes([*run, "--model.learning_rate", "0.5"], fails=True).stderr
    assert log.count("metrics.json belongs to a run with model.learning_rate=0.01") == 2


PROCESSES = {  # who opens images and who scores them
    "one data worker": ["--data.num_workers", "1"],
    "two data workers": ["--data.num_workers", "2"],
    "two processes": TWO,
    "two processes, two data workers each": [*TWO, "--data.num_workers", "2"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("who", PROCESSES)
def test_the_same_probes_count_the_same_pixels(who, one, checkpoints, uneven, tmp_path):
    """Five images: the batches of three and of two processes differ. All integers, and what is made of them alone."""
    run = ["test", *arguments(checkpoints["causal"], uneven, tmp_path)[1:], *PROCESSES[who]]
    processes([*run, "--ckpt_path", str(one / "checkpoints/last.ckpt")])
    assert (tmp_path / "counts.safetensors").read_bytes() == (
        one / "counts.safetensors"
    ).read_bytes()
    assert (tmp_path / "probes.safetensors").read_bytes() == (
        one / "probes.safetensors"
    ).read_bytes()
    assert metrics(tmp_path)["sites"] == metrics(one)["sites"]


@pytest.mark.distributed
def test_bad_file_of_one_rank_ends_all_ranks_with_the_same_message(checkpoints, tmp_path):
    root = tiny_models.write_segmentation(tmp_path / "data")
    Image.fromarray(np.full((24, 20), 9, np.uint8)).save(
        root / "annotations/training/003.png"
    )  # the second rank's
    message = processes(
        arguments(checkpoints["causal"], root, tmp_path / "run", *TWO), fails=True
    ).stderr
    assert "003.png has label 9" in message
    assert message.count("1 of 11 images cannot be used") >= 2, "both ranks say so"


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_dies_ends_the_other_and_nothing_is_called_finished(
    rank, checkpoints, uneven, tmp_path
):
    run = arguments(checkpoints["causal"], uneven, tmp_path / "run", *TWO)
    killed(
        run, tmp_path, "on_train_batch_start", 5, rank
    )  # both have ended; DDP's timeout is longer than the wait
    assert not (tmp_path / "run/metrics.json").exists()
    assert latest_valid_checkpoint(tmp_path / "run/checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
def test_run_killed_within_an_epoch_ends_as_an_undisturbed_one(
    death, one, checkpoints, uneven, tmp_path
):
    hook, step, saved_step = DEATHS[death]
    run = arguments(checkpoints["causal"], uneven, tmp_path / "run")
    done = killed(run, tmp_path, hook, step)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (tmp_path / "run/metrics.json").exists()
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == saved_step, "in the middle of an epoch"
    main([*run, "--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt")])
    same_probes(one, tmp_path / "run", rtol=0, atol=0)
    assert metrics(one)["sites"] == metrics(tmp_path / "run")["sites"]


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def same_probes(a: Path, b: Path, **tolerance) -> None:
    ours, theirs = (load_file(out / "probes.safetensors") for out in (a, b))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            theirs[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
