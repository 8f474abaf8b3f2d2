"""Probe runs on several processes and across a kill: the same probes and scores as one process that nothing happens to."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

RUN = [sys.executable, "-m", "probes", "fit", "-c", "configs/demo/probes.yaml", "--trainer.max_epochs", "3"]
KILLED_AT = 4  # optimizer steps: in the second epoch of three steps


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Seven training images, of very different labelled area, and five for validation: neither divides by two."""
    root = tiny.write_segmentation(tmp_path_factory.mktemp("uneven"), training=7)
    for i, path in enumerate(sorted((root / "annotations/training").glob("*.png"))):
        mask = np.array(Image.open(path))
        mask[3 * i :] = 255
        Image.fromarray(mask).save(path)
    return root


def fit(checkpoint, root, out, *more: str, fails: bool = False) -> str:
    command = [*RUN, "--model.mllm", str(checkpoint), "--data.root", str(root), "--out", str(out)]
    command += ["--data.batch_size", "3", "--data.cache", "false", "--model.feature_norm", "none", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture(scope="module")
def one(checkpoints, uneven, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    fit(checkpoints["causal"], uneven, out)
    return out


@pytest.mark.distributed
@pytest.mark.parametrize("cache", ["false", "true"])
def test_two_processes_train_and_score_as_one(one, cache, checkpoints, uneven, tmp_path):
    """The last batch of each epoch has one image: the other rank has none. Masks differ in labelled area."""
    fit(checkpoints["causal"], uneven, tmp_path, *TWO, "--data.cache", cache)
    same_probes(one, tmp_path, rtol=1e-4, atol=1e-6)
    alone, together = (json.loads((out / "metrics.json").read_text()) for out in (one, tmp_path))
    assert together["images"] == 5 and alone["probe"] == together["probe"]
    for a, b in zip(alone["sites"], together["sites"], strict=True):
        assert a["history"] == pytest.approx(b["history"], abs=0.005) and a["pacc"] == pytest.approx(b["pacc"], abs=0.005)


@pytest.mark.distributed
def test_bad_files_of_one_rank_end_all_ranks_alike(checkpoints, uneven, tmp_path):
    root = tiny.write_segmentation(tmp_path / "data")
    Image.fromarray(np.full((24, 20), 9, np.uint8)).save(root / "annotations/training/003.png")  # the second rank's
    message = fit(checkpoints["causal"], root, tmp_path / "run", *TWO, fails=True)
    assert "1 of 11 images cannot be used" in message and "003.png has label 9" in message
    assert message.count("1 of 11 images") >= 2, "both ranks say so"


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["false", "true"])
def test_run_killed_in_mid_epoch_ends_as_an_uninterrupted_one(cache, checkpoints, uneven, tmp_path):
    (tmp_path / "killer.py").write_text(
        "import os, signal\nfrom lightning import Callback\n\nclass Killer(Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        f"        if trainer.global_step == {KILLED_AT + 1}:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "save.yaml").write_text(
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
        "init_args: {save_last: true, every_n_train_steps: 2}}]}"
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    saved = ["-c", str(tmp_path / "save.yaml"), "--data.cache", cache]
    fit(checkpoints["causal"], uneven, whole, *saved)
    killer = ["-c", str(tmp_path / "killer.yaml")]
    Path(killer[1]).write_text("trainer: {callbacks+: [{class_path: killer.Killer}]}")
    command = [*RUN, "--model.mllm", str(checkpoints["causal"]), "--data.root", str(uneven), "--out", str(cut)]
    command += ["--data.batch_size", "3", "--model.feature_norm", "none", *saved, *killer]
    import os

    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    killed = subprocess.run(command, capture_output=True, timeout=300, env=os.environ | {"PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    saved_at = torch.load(cut / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert saved_at == KILLED_AT and not (cut / "metrics.json").exists()
    fit(checkpoints["causal"], uneven, cut, *saved, "--ckpt_path", "last")
    same_probes(whole, cut, rtol=0, atol=0)
    assert scores(whole) == scores(cut)


def scores(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["sites"]


def same_probes(a: Path, b: Path, **tolerance) -> None:
    ours, theirs = (load_file(out / "probes.safetensors") for out in (a, b))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
