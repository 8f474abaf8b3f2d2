"""The benchmarks and experiments run; what they measure is theirs to print, never to assert."""

import ast
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
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
        if isinstance(node, ast.ImportFrom) and node.module.startswith(("llava_bidir", "probes")):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_and_writes_its_numbers(tmp_path):
    options = "--device cpu --shape toy --images 2 --mask-px 64 --rounds 1".split()
    python(HERE / "gpu.py", *options, "--out", tmp_path / "found.json")
    results = json.loads((tmp_path / "found.json").read_text())
    rates = [step["images_s"] for step in results["sweep"].values() if isinstance(step, dict)]
    assert len(rates) == 6 and min(rates) > 0
    assert results["sweep"]["hours"] > 0
    assert results["loss"]["gradient_error"] < 1e-4


@pytest.mark.nightly
def test_the_table_of_the_loss_is_printed():
    table = python(
        "-c",
        "import bench, loss; loss.CASES = {'small': (5, 1, (96, 128))}; "
        "loss.bench_loss(bench.paired, lambda step: 1.0, rounds=1)",
    )
    rows = [line.split() for line in table.splitlines() if "ms " in line and "x" in line]
    errors = [float(row[4]) for row in rows]
    assert [row[0] for row in rows] == ["2", "3", "5"]
    assert errors[-1] < 1e-6 < errors[0] < 1e-2


@pytest.mark.nightly
def test_the_gpu_hours_of_the_readme_are_those_of_the_command():
    rows = python(HERE / "gpu_hours.py").splitlines()[-3:]
    assert "\n".join(rows) in (ROOT / "llava_bidir/README.md").read_text()
