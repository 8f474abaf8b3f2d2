"""Runs on several processes, and killed and resumed runs, give the probes and scores of an undisturbed run."""

import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import solving
import task_runs as task_commands
import tiny_models
import torch
import two_ranks
from optima import assert_same_solution
from PIL import Image
from processes import run_command
from run_bytes import assert_same_results
from safetensors.torch import load_file

from llava_bidir.common.runs import last_checkpoint
from probes import ProbeRun
from probes.cli import main

KILLER = """
import os, signal
from lightning import Callback

class Killer(Callback):
    def on_train_batch_start(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == (RANK, 5):
            os.kill(os.getpid(), signal.SIGKILL)
"""
KILLING = """
trainer: {callbacks: [{class_path: killer.Killer}]}
checkpoints: {every_n_steps: 2}
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


# three epochs of three steps; the last batch of an epoch has one image
THREE = """--trainer.max_epochs 3 --data.batch_size 3 --data.cache_features false
--model.feature_norm layernorm --model.head conv""".split()


@pytest.fixture
def killed(checkpoints, uneven, tmp_path):
    """A function that kills a rank of a run before its sixth step, and returns command, folder and exit status."""

    def kill(rank: int, *more: str) -> tuple[list[str], Path, int]:
        run = tmp_path / "run"
        command = probe_runs.arguments(checkpoints["causal"], uneven, run, *THREE, *more)
        (tmp_path / "killer.py").write_text(KILLER.replace("RANK", str(rank)))
        (tmp_path / "killing.yaml").write_text(KILLING)
        more = ["-c", tmp_path / "killing.yaml", "--import", tmp_path / "killer.py"]
        killing = [sys.executable, "-m", "probes", *command, *more]
        done = run_command(killing, must_pass=False)
        assert not (run / "metrics.json").exists(), done.stderr[-3000:]
        return command, run, done.returncode

    return kill


@pytest.fixture(scope="module")
def one(checkpoints, uneven, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    main(probe_runs.arguments(checkpoints["causal"], uneven, out, *THREE))
    return out


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A data set with a bad mask, which the second rank reads."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("bad"))
    mask = Image.fromarray(np.full((24, 20), 9, np.uint8))
    mask.save(root / "annotations/training/003.png")
    return root


@pytest.fixture(scope="module")
def together(one, bad, checkpoints, uneven, segmentation, task_root, tmp_path_factory):
    """(Folder with a run per command on two processes, what both processes said of each)."""
    folder = tmp_path_factory.mktemp("together")
    model = checkpoints["causal"]
    shutil.copytree(one, folder / "copy")
    last = [*THREE, "--ckpt_path", "last"]
    cached = [*THREE, "--data.cache_features"]
    same = [*THREE, "--data.num_workers", "2", "--ckpt_path", f"{one}/checkpoints/last.ckpt"]
    commands = {
        name: probe_runs.arguments(model, root, folder / out, *more)
        for name, root, out, more in (
            ("finished", uneven, "copy", last),
            ("another rate", uneven, "copy", [*last, "--model.learning_rate", "0.5"]),
            ("cache true", uneven, "cache true", [*cached, "true"]),
            ("cache false", uneven, "cache false", [*cached, "false"]),
            ("same probes", uneven, "same probes", same),
            ("bad", bad, "bad", THREE),
        )
    }
    for name, memory in (("solve", "8"), ("solve from files", "0")):
        out = folder / name
        commands[name] = solving.arguments(model, segmentation, out, "--memory-gb", memory)
    out = folder / "normals"
    commands["normals"] = task_commands.arguments("solve", "normals", model, task_root, out)
    commands = {name: ["probes", *argv, *two_ranks.TWO] for name, argv in commands.items()}
    return folder, two_ranks.run(commands, folder)


@pytest.mark.distributed
@pytest.mark.parametrize("cache", ["false", "true"])
def test_two_processes_train_and_score_as_one(cache, one, together):
    """Masks differ in labelled area, and in the last batch one rank has no image."""
    run = together[0] / f"cache {cache}"
    assert_same_probes(run, one, rtol=1e-3, atol=1e-4)
    ours, expected = (ProbeRun(path).metrics for path in (run, one))
    assert ours["images"] == 5
    assert ours["probe"] == expected["probe"]
    for a, b in zip(expected["sites"], ours["sites"], strict=True):
        assert a["history"] == pytest.approx(b["history"], abs=0.005)
        assert a["pacc"] == pytest.approx(b["pacc"], abs=0.005)


@pytest.mark.distributed
def test_the_first_process_decides_for_both_what_is_resumed(together):
    """A finished run is found by its files, before a checkpoint is looked for."""
    said = together[1]
    assert "the checkpoint is " not in said["finished"]
    assert said["finished"].count("this run is finished; nothing to do") == 1
    refusal = "metrics.json belongs to a run with model.learning_rate=0.01"
    assert said["another rate"].count(refusal) == 1  # by the first process, which compares for both


@pytest.mark.distributed
def test_the_same_probes_count_the_same_pixels(one, together):
    """Five images: the batches of one process and of two, each with two data workers, differ."""
    assert_same_results(together[0] / "same probes", one)


@pytest.mark.distributed
def test_bad_file_of_one_rank_ends_all_ranks_with_the_same_message(together):
    said = together[1]["bad"]
    assert "003.png has label 9" in said
    assert said.count("1 of 11 images cannot be used") >= 2, "both ranks say so"


@pytest.mark.distributed
def test_two_processes_solve_the_probes_of_one(together, checkpoints, segmentation, tmp_path):
    main(solving.arguments(checkpoints["causal"], segmentation, tmp_path))
    run = ProbeRun(together[0] / "solve")
    assert_same_solution(ProbeRun(tmp_path), run)
    assert run.metrics["images"] == 5
    assert_same_results(together[0] / "solve from files", run.path)


@pytest.mark.distributed
def test_two_processes_solve_the_closed_form_of_one(together, task_runs):
    run = together[0] / "normals"
    alone = task_runs["normals"]
    for ours, theirs in zip(ProbeRun(run).strengths.sites, alone.strengths.sites, strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], rel=1e-2)
    torch.testing.assert_close(
        ProbeRun(run).sums_at(alone.sites), alone.sums_at(alone.sites), rtol=1e-2, atol=1e-1
    )


@pytest.mark.distributed
def test_rank_that_dies_ends_the_other_and_nothing_is_called_finished(killed):
    """Both have ended when the command has: DDP's timeout is longer than the wait for it."""
    _, run, status = killed(1, *two_ranks.TWO)
    assert status != 0
    assert last_checkpoint(run / "checkpoints")


@pytest.mark.slow
def test_run_killed_within_an_epoch_ends_as_an_undisturbed_one(killed, one):
    command, run, status = killed(0)
    assert status == -signal.SIGKILL
    checkpoint = run / "checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4, "within an epoch"
    main([*command, "--ckpt_path", str(checkpoint)])
    assert_same_probes(run, one, rtol=0, atol=0)
    assert ProbeRun(run).metrics["sites"] == ProbeRun(one).metrics["sites"]


def assert_same_probes(run: Path, other: Path, **tolerance) -> None:
    ours, theirs = (load_file(out / "probes.safetensors") for out in (run, other))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, **tolerance, msg=name)
