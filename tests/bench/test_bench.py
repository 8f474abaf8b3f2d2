"""The benchmarks and experiments run; what they measure is theirs to print, never to assert."""

import ast
import importlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import run_command

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPTS = sorted([*HERE.glob("*.py"), *ROOT.glob("experiments/*/*.py")])


def python(*words: object) -> str:
    folders = (ROOT, HERE.parent / "helpers", HERE)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    return run_command([sys.executable, *map(str, words)], env=environment).stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_imports_of_the_packages_is_there(path):
    """Most scripts run in no test."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in (
            "llava_bidir",
            "probes",
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                getattr(module, alias.name)


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_and_writes_its_numbers(tmp_path):
    options = "--device cpu --shape toy --images 2 --mask-px 64 --rounds 1".split()
    python(HERE / "gpu.py", *options, "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    steps = ("frozen forward", "training step", "solver step", "validation step")
    steps += ("training step, naive", "validation step, naive")
    assert all(found["sweep"][step]["images_s"] > 0 for step in steps)
    assert found["sweep"]["hours"] > 0
    assert found["loss"]["gradient_error"] < 1e-4


WRITE_STATES = """
import sys, torch
from synthetic_states import Synthetic

images, classes = map(int, sys.argv[1:3])
parts = list(Synthetic(images, 16, 64, classes, decay=1.0, image_share=0.1).batches())
states = torch.cat([part[1] for part in parts])
targets = sum((part[3] for part in parts), [])
data = {"training": (states, targets), "validation": (states[:8], targets[:8])}
torch.save({"classes": classes} | data, sys.argv[3])
"""
ON_A_PRETENDED_GPU = """
import runpy, sys, torch
from pretend_gpu import pretend_gpu

sys.argv = sys.argv[1:]
torch.cuda.max_memory_allocated = lambda: 0
with pretend_gpu():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_probes_by_passes_end_at_the_strength_and_score_of_all_in_memory(device, tmp_path):
    python("-c", WRITE_STATES, 40, 8, tmp_path / "states.pt")
    command = [HERE / "passes.py", tmp_path / "states.pt", "--share", 1, 0.1, "--device", device]
    if device == "cuda":
        command = ["-c", ON_A_PRETENDED_GPU, *command]
    line = re.compile(r"share \S+: (\d+) passes, strength (\S+), mIoU ([\d. ]+)\(.*, converged: ")
    whole, sampled = line.findall(python(*command))
    assert whole[0] == "1"
    assert 1 < int(sampled[0]) <= 20
    assert sampled[1] == whole[1]
    ours, theirs = (
        torch.tensor([float(x) for x in found[2].split()]) for found in (sampled, whole)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.5)


@pytest.mark.nightly
def test_the_table_of_the_loss_and_the_coverage_of_random_draws_are_printed():
    code = "import sys, bench, loss; from experiments.statistics import draws; "
    code += "loss.CASES = {'small': (5, 1, (96, 128))}; "
    code += "loss.bench_loss(bench.paired, lambda step: 1.0, rounds=1); "
    code += "print('draws'); sys.argv[1:] = ['--studies', '50']; draws.main()"
    table, _, coverage = python("-c", code).partition("draws\n")
    rows = [line.split() for line in table.splitlines() if "ms " in line and "x" in line]
    errors = [float(row[4]) for row in rows]
    assert [row[0] for row in rows] == ["2", "3", "4", "5", "8"]
    assert errors[-1] < 1e-6 < errors[0] < 1e-2
    assert len(coverage.splitlines()) == 1 + 2 * 3 * 2 * 5
