"""Run pretended_gpu.py in a process of its own: libraries remember for good whether a GPU is available."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import HANGING_S


def run(speed: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        speed,
        "tests/pretended_gpu.py",
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=HANGING_S,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_probes_are_trained_and_used_on_a_pretended_gpu():
    run("not nightly")


@pytest.mark.nightly
def test_all_commands_and_families_on_a_pretended_gpu():
    run("nightly")
