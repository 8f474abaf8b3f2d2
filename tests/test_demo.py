"""The demo's graph: what is done twice, what is not, and that a kill at any moment changes no result.

With DEMO=FOLDER, the tests use what `make demo OUT=FOLDER SCALE=0.05 EXTRAS=yes` has made, as `.ci/run` does; else they
make it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import network_guard
import numpy as np
import pytest
from processes import HANGING_S
from safetensors.numpy import load_file

from llava_bidir.common.run_lock import exclusive_run_lock

ROOT = Path(__file__).parents[1]
SCALE = "0.05"
DEMO_S = 2 * HANGING_S  # its then 38 steps took 22 minutes on a machine with three times as many processes as cores
REPORT = "report/results.json"
# Training, fitted and solved probes and a knockout, each of which goes on from what a killed run has left.
PART = ("causal/probes/knockout.safetensors", "causal/solved/path.safetensors", "causal/stage2/hf/model.safetensors")

pytestmark = pytest.mark.slow


def command(out: Path, *goals: str) -> list[str]:
    variables = [f"PY={sys.executable}", f"OUT={out}", f"SCALE={SCALE}", "EXTRAS=yes"]
    return ["make", "--no-print-directory", "-j2", *variables, *(f"{out}/{goal}" for goal in goals or [REPORT])]


def run(out: Path, *goals: str) -> str:
    """Without a network where that can be had, and watched for attempts to reach one."""
    make = [*network_guard.cut(), *command(out, *goals)]
    environment = network_guard.watched(out / "network")
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=DEMO_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(out: Path) -> dict:
    """Everything but what tells when and where."""
    found = json.loads((out / "report/results.json").read_text().replace(str(out), "OUT"))
    del found["wall_s"]
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = Path(os.environ.get("DEMO") or tmp_path_factory.mktemp("demo")).absolute()
    run(out)
    return out


def test_results_name_every_mask_and_control(finished):
    found = results(finished)
    assert set(found["masks"]) == set(found["controls"]["untrained"]) == {"causal", "bidirectional"}
    claimed = {(claim["claim"], claim["image_attention"]) for claim in found["claims"]}
    assert {(c, m) for c in ("adapter_drop", "recovery", "recovery_trained") for m in found["masks"]} <= claimed
    assert all(found["masks"][mask]["answer_accuracy"] is not None for mask in found["masks"])
    beyond = {claim["claim"]: claim["verdicts"]["beyond_random"] for claim in found["claims"]}
    assert {"adapter_drop", "recovery", "starvation"} <= {name for name in beyond if beyond[name].get("draws") == 2}
    assert all(len(found["controls"]["random"][mask]) >= 2 for mask in found["masks"])


def test_no_network_is_reached_for(finished):
    assert network_guard.reached_for(finished / "network") == []


def test_second_run_does_nothing(finished):
    assert "up to date" in run(finished)


def test_second_demo_in_the_same_folder_is_refused_before_it_touches_anything(tmp_path):
    (tmp_path / "settings").write_text("seed 0 scale 1 world context\n")
    command = ["make", "-o", ".venv/installed", "demo", f"PY={sys.executable}", f"OUT={tmp_path}", "SEED=1"]
    with exclusive_run_lock(tmp_path):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode != 0 and f"{tmp_path} is in use by process {os.getpid()} on" in done.stderr
    assert (tmp_path / "settings").read_text() == "seed 0 scale 1 world context\n" and not (tmp_path / "logs").exists()


FOLLOWS = {  # deleted result -> the steps that make it and what follows from it
    "causal/probes/umap.json": {"causal_umap", "report"},
    "causal/untrained/counts.safetensors": {"causal_untrained", "report"},
    "causal/random1/path.safetensors": {"causal_random1", "causal_random1_knockout", "report"},
    "bidirectional/probes/metrics.json": {
        *(f"bidirectional_{step}" for step in ("probes", "knockout", "maps", "umap")),
        *("starvation", "explorer", "report"),
    },
}


@pytest.mark.parametrize(("deleted", "again"), FOLLOWS.items())
def test_deleted_result_is_made_again_with_what_follows_and_nothing_else(finished, deleted, again):
    before = results(finished)
    (finished / deleted).rename(kept := finished / "kept")
    plan = subprocess.run(["make", "-n", *command(finished)[1:]], cwd=ROOT, capture_output=True, text=True).stdout
    assert {line.split()[2] for line in plan.splitlines() if line.startswith('echo "')} == again
    if deleted.endswith("umap.json"):
        run(finished)
        assert results(finished) == before
    else:
        kept.rename(finished / deleted)


def test_another_seed_replaces_a_demo_unless_it_is_finished(finished):
    settings, report, kept = finished / "settings", finished / REPORT, finished / "kept"
    before, written = settings.read_text(), settings.stat().st_mtime
    make = ["make", "-n", "SEED=7", *command(finished)[1:]]
    plan = lambda: subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    refused = plan()
    assert refused.returncode != 0 and "holds a finished demo of seed 0 scale 0.05 world context" in refused.stderr
    assert settings.read_text() == before
    report.rename(kept)
    anew = plan().stdout
    kept.rename(report)
    settings.write_text(before)  # make wrote the other seed down while it planned
    os.utime(settings, (written, written))
    assert sum(line.startswith('echo "') for line in anew.splitlines()) == 52


def test_several_seeds_are_reported_with_all_their_runs(tmp_path):
    make = ["make", "-n", f"PY={sys.executable}", "SEEDS=3 4", "SCALE=1", f"OUT={tmp_path}", "demo"]
    plan = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (joint,) = [text for text in plan.replace("\\\n", " ").splitlines() if f"--out {tmp_path}/report" in text]
    classes, tasks = (part.split() for part in joint.partition(" --out ")[0].split(" --tasks "))
    for seed in (3, 4):
        for mask in ("causal", "bidirectional"):
            assert f"{tmp_path}/seed{seed}/{mask}/solved" in classes
            for task in ("depth", "normals", "boundaries"):
                assert {f"{tmp_path}/seed{seed}/{mask}/{task}{kind}" for kind in ("", "_random")} <= set(tasks)
    assert len(tasks) == 2 * 2 * 3 * 2


def test_kills_at_random_moments_change_no_result(finished, tmp_path):
    """kill -9 of make and all that it started, again and again; then it is let finish."""
    chance, out, kills = random.Random(0), tmp_path / "demo", 0
    (out / "logs").mkdir(parents=True)
    shutil.copy(finished / "settings", out)
    while kills < 5:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        running = subprocess.Popen(command(out, *PART), cwd=ROOT, start_new_session=True, **quiet)
        time.sleep(chance.uniform(3, 25))
        if running.poll() is not None:
            break  # it finished first
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(HANGING_S)
        kills += 1
    run(out, *PART)
    assert kills > 0
    for file in PART:
        killed, whole = load_file(out / file), load_file(finished / file)
        assert killed.keys() == whole.keys()
        assert all(np.array_equal(killed[name], whole[name], equal_nan=True) for name in whole), file
