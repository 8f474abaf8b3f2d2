"""The benchmarks run; what they measure is theirs to print, never to assert."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import HANGING_S

HERE = Path(__file__).parent


@pytest.mark.slow
def test_training_steps_of_all_sides_are_timed(tmp_path):
    command = [sys.executable, HERE / "training.py", "--steps", "4", "--out", tmp_path / "found.json"]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for stage in ("stage 1", "stage 2"):
        assert set(found[stage]["seconds"]) == {"causal", "bidirectional", "stock"}
        assert all(seconds > 0 for seconds in found[stage]["seconds"].values()) and found[stage]["flops"] > 0


@pytest.mark.slow
def test_samples_of_the_mix_are_timed_on_all_sides(tmp_path):
    command = [sys.executable, HERE / "mix.py", "--samples", "64", "--rounds", "1", "--out", tmp_path / "found.json"]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["samples_per_s"]) == 6 and all(rates[0] > 0 for rates in found["samples_per_s"].values())


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed (extra: cluster) is not installed")
def test_saves_of_both_kinds_are_timed(tmp_path):
    command = [sys.executable, HERE / "save.py", "--layers", "1", "--rounds", "1", "--out", tmp_path / "found.json"]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["checkpoint_gb"] > 0.1 and all(len(s) == 1 and s[0] > 0 for s in found["waits_s"].values())


@pytest.mark.slow
def test_the_gpus_benchmark_runs_without_one(tmp_path):
    command = [sys.executable, HERE / "gpu.py", "--device", "cpu", "--shape", "toy", "--images", "2", "--mask-px", "64"]
    command += ["--rounds", "1", "--out", tmp_path / "found.json"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for step in (
        "frozen forward",
        "training step",
        "training step, naive",
        "solver step",
        "validation step",
        "validation step, naive",
    ):
        assert found["sweep"][step]["images_s"] > 0
    assert found["sweep"]["hours"] > 0 and found["loss"]["gradient_error"] < 1e-4


@pytest.mark.slow
def test_the_table_of_the_loss_is_printed():
    code = "import bench, loss; loss.CASES = {'small': (5, 1, (96, 128))}; "
    code += "loss.bench_loss(bench.paired, lambda step: 1.0, rounds=1)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines() if "ms " in line and "x" in line]
    errors = [float(row[4]) for row in rows]
    assert [row[0] for row in rows] == ["2", "3", "4", "5", "8"] and errors[-1] < 1e-6 < errors[0] < 1e-2


@pytest.mark.slow
def test_coverage_of_random_draws_is_simulated():
    command, environment = [sys.executable, HERE / "draws.py", "--studies", "50"], {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1 + 2 * 3 * 2 * 5
