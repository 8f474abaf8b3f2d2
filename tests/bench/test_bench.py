"""The benchmarks run; what they measure is theirs to print, never to assert."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANGING_S

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def python(*words: object) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGING_S)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_mix_runs_and_writes_its_numbers(tmp_path):
    python(HERE / "mix.py", "--samples", "64", "--rounds", "1", "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["samples_per_s"]) == 5 and all(rates[0] > 0 for rates in found["samples_per_s"].values())


def test_the_table_of_the_loss_and_the_coverage_of_random_draws_are_printed():
    code = "import sys, bench, draws, loss; loss.CASES = {'small': (5, 1, (96, 128))}; "
    code += "loss.bench_loss(bench.paired, lambda step: 1.0, rounds=1); "
    code += "print('draws'); sys.argv[1:] = ['--studies', '50']; draws.main()"
    table, _, coverage = python("-c", code).partition("draws\n")
    rows = [line.split() for line in table.splitlines() if "ms " in line and "x" in line]
    errors = [float(row[4]) for row in rows]
    assert [row[0] for row in rows] == ["2", "3", "4", "5", "8"] and errors[-1] < 1e-6 < errors[0] < 1e-2
    assert len(coverage.splitlines()) == 1 + 2 * 3 * 2 * 5
