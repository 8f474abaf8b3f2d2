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
import solving
import task_runs as task_commands
import tiny_models
import torch
import two_ranks
from optima import assert_same_solution
from PIL import Image
from processes import HANGING_S, run_ranks
from safetensors.torch import load_file

from llava_bidir.common.runs import last_checkpoint
from probes import ProbeRun
from probes.cli import main

# Epochs have three steps, and every second step is saved unless it ends an epoch: (hook, step of death, saved step)
DEATHS = {
    "a step after a checkpoint": ("on_train_batch_end", 5, 4),
    "validation": ("on_validation_start", 6, 4),
}
KILLER = """
import os, signal
from lightning import Callback

class Killer(Callback):
    def HOOK(self, trainer, *_):
        if (trainer.global_rank, trainer.global_step) == (RANK, STEP):
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


THREE = """--trainer.max_epochs 3 --data.batch_size 3 --data.cache_features false
--model.feature_norm layernorm --model.head conv""".split()


def arguments(
    checkpoint,
    root,
    out,
    *more: str,
) -> list[str]:
    """Three epochs of three steps; the last batch of an epoch has one image."""
    return probe_runs.arguments(
        checkpoint,
        root,
        out,
        *THREE,
        *more,
    )


def killed(
    run: list[str],
    folder: Path,
    hook: str,
    step: int,
    rank: int = 0,
) -> subprocess.CompletedProcess:
    """The run, in which a rank is killed; checkpoints are saved on the way."""
    code = KILLER.replace("HOOK", hook).replace("STEP", str(step)).replace("RANK", str(rank))
    (folder / "killer.py").write_text(code)
    (folder / "killing.yaml").write_text(KILLING)
    path = f"{folder}:{os.environ.get('PYTHONPATH', '')}"
    # one thread, as in this process: sums depend on the number of threads
    done = subprocess.run(
        [sys.executable, "-m", "probes", *run, "-c", str(folder / "killing.yaml")],
        capture_output=True,
        text=True,
        timeout=HANGING_S,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode != 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def one(checkpoints, uneven, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    main(arguments(checkpoints["causal"], uneven, out))
    return out


@pytest.fixture(scope="module")
def bad(tmp_path_factory) -> Path:
    """A data set with a bad mask, which the second rank reads."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("bad"))
    mask = Image.fromarray(np.full((24, 20), 9, np.uint8))
    mask.save(root / "annotations/training/003.png")
    return root


@pytest.fixture(scope="module")
def together(
    one,
    bad,
    checkpoints,
    uneven,
    segmentation,
    task_root,
    tmp_path_factory,
):
    """(Folder with a run per command on two processes, what both processes said of each)."""
    folder = tmp_path_factory.mktemp("together")
    model = checkpoints["causal"]
    last = ["--ckpt_path", str(one / "checkpoints/last.ckpt")]
    shutil.copytree(one, folder / "copy")
    copy = arguments(
        model,
        uneven,
        folder / "copy",
        "--ckpt_path",
        "last",
    )
    commands = {"finished": copy, "another rate": [*copy, "--model.learning_rate", "0.5"]}
    for cache in ("true", "false"):
        name = f"cache {cache}"
        options = ["--data.cache_features", cache]
        commands[name] = arguments(
            model,
            uneven,
            folder / name,
            *options,
        )
    more = ["--data.num_workers", "2", *last]
    commands["same probes"] = arguments(
        model,
        uneven,
        folder / "same probes",
        *more,
    )
    commands["bad"] = arguments(model, bad, folder / "bad")
    commands["solve"] = solving.arguments(model, segmentation, folder / "solve")
    name = "solve from files"
    more = ["--memory-gb", "0"]
    commands[name] = solving.arguments(
        model,
        segmentation,
        folder / name,
        *more,
    )
    out = folder / "normals"
    commands["normals"] = task_commands.arguments(
        "solve",
        "normals",
        model,
        task_root,
        out,
    )
    commands = {name: [*argv, *two_ranks.TWO] for name, argv in commands.items()}
    return folder, two_ranks.run(commands, folder, HANGING_S)


@pytest.mark.distributed
@pytest.mark.parametrize("cache", ["false", "true"])
def test_two_processes_train_and_score_as_one(cache, one, together):
    """Masks differ in labelled area, and in the last batch one rank has no image."""
    run = together[0] / f"cache {cache}"
    same_probes(
        one,
        run,
        rtol=1e-3,
        atol=1e-4,
    )
    assert metrics(run)["images"] == 5
    assert metrics(one)["probe"] == metrics(run)["probe"]
    for a, b in zip(metrics(one)["sites"], metrics(run)["sites"], strict=True):
        assert a["history"] == pytest.approx(b["history"], abs=0.005)
        assert a["pacc"] == pytest.approx(b["pacc"], abs=0.005)


@pytest.mark.distributed
def test_the_first_process_decides_for_both_what_is_resumed(together):
    """A finished run is found by its files, before a checkpoint is looked for."""
    said = together[1]
    assert "resuming " not in said["finished"]
    assert said["finished"].count("this run is finished; nothing to do") == 1
    refusal = "metrics.json belongs to a run with model.learning_rate=0.01"
    assert said["another rate"].count(refusal) == 1  # by the first process, which compares for both


@pytest.mark.distributed
def test_the_same_probes_count_the_same_pixels(one, together):
    """Five images: the batches of one process and of two, each with two data workers, differ."""
    run = together[0] / "same probes"
    for name in ("counts.safetensors", "probes.safetensors"):
        assert (run / name).read_bytes() == (one / name).read_bytes(), name
    assert metrics(run)["sites"] == metrics(one)["sites"]


@pytest.mark.distributed
def test_bad_file_of_one_rank_ends_all_ranks_with_the_same_message(together):
    said = together[1]["bad"]
    assert "003.png has label 9" in said
    assert said.count("1 of 11 images cannot be used") >= 2, "both ranks say so"


@pytest.mark.distributed
def test_two_processes_solve_the_probes_of_one(
    together,
    checkpoints,
    segmentation,
    tmp_path,
):
    main(solving.arguments(checkpoints["causal"], segmentation, tmp_path))
    assert_same_solution(ProbeRun(tmp_path), ProbeRun(together[0] / "solve"))
    assert metrics(together[0] / "solve")["images"] == 5


@pytest.mark.distributed
def test_processes_that_map_files_solve_the_same_probes(together):
    for name in ("probes.safetensors", "effects.safetensors", "counts.safetensors"):
        in_memory = together[0] / "solve" / name
        mapped = together[0] / "solve from files" / name
        assert mapped.read_bytes() == in_memory.read_bytes(), name


DIES_IN_A_SEARCH = """
import os, signal, sys
import torch
from probes.cli import main
from probes.solve.path import FoldSearch

torch.set_num_threads(1)  # sites are solved one after the other
visit = FoldSearch.visit
visited = []

def die(self, strength):
    visited.append(strength)
    if len(visited) == 4 and os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    visit(self, strength)

FoldSearch.visit = die
main(sys.argv[1:])
"""


@pytest.mark.distributed
@pytest.mark.slow
def test_a_search_in_which_one_of_two_processes_is_killed_resumes_to_the_same_bytes(
    together,
    checkpoints,
    segmentation,
    tmp_path,
):
    out = tmp_path / "run"
    command = solving.arguments(
        checkpoints["causal"],
        segmentation,
        out,
        *two_ranks.TWO,
    )
    codes, _ = run_ranks([sys.executable, "-c", DIES_IN_A_SEARCH, *command], tmp_path)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert not (out / "metrics.json").exists()
    assert (out / "checkpoints" / "encoder.safetensors").exists()
    two_ranks.run({"resumed": [*command, "--ckpt_path", "last"]}, tmp_path, HANGING_S)
    for name in ("probes.safetensors", "effects.safetensors", "counts.safetensors"):
        assert (out / name).read_bytes() == (together[0] / "solve" / name).read_bytes(), name


@pytest.mark.distributed
def test_two_processes_solve_the_closed_form_of_one(together, task_runs):
    run = together[0] / "normals"
    alone = task_runs["normals"]
    for ours, theirs in zip(ProbeRun(run).strengths.sites, alone.strengths.sites, strict=True):
        assert ours["mean"] == pytest.approx(theirs["mean"], rel=1e-2)
    torch.testing.assert_close(
        ProbeRun(run).sums_at(alone.sites),
        alone.sums_at(alone.sites),
        rtol=1e-2,
        atol=1e-1,
    )


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_rank_that_dies_ends_the_other_and_nothing_is_called_finished(
    rank,
    checkpoints,
    uneven,
    tmp_path,
):
    run = arguments(
        checkpoints["causal"],
        uneven,
        tmp_path / "run",
        *two_ranks.TWO,
    )
    killed(
        run,
        tmp_path,
        "on_train_batch_start",
        5,
        rank,
    )  # both have ended; DDP's timeout is longer than the wait
    assert not (tmp_path / "run/metrics.json").exists()
    assert last_checkpoint(tmp_path / "run/checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
def test_run_killed_within_an_epoch_ends_as_an_undisturbed_one(
    death,
    one,
    checkpoints,
    uneven,
    tmp_path,
):
    hook, step, saved_step = DEATHS[death]
    run = arguments(checkpoints["causal"], uneven, tmp_path / "run")
    done = killed(
        run,
        tmp_path,
        hook,
        step,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not (tmp_path / "run/metrics.json").exists()
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == saved_step, "in the middle of an epoch"
    main([*run, "--ckpt_path", str(tmp_path / "run/checkpoints/last.ckpt")])
    same_probes(
        one,
        tmp_path / "run",
        rtol=0,
        atol=0,
    )
    assert metrics(one)["sites"] == metrics(tmp_path / "run")["sites"]


def metrics(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def same_probes(a: Path, b: Path, **tolerance) -> None:
    ours, theirs = (load_file(out / "probes.safetensors") for out in (a, b))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(
            theirs[name],
            tensor,
            **tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )
