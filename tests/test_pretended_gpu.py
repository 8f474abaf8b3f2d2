"""Run pretended_gpu.py in a process of its own: libraries remember for good whether a GPU is available."""

import sys
from pathlib import Path

import pytest
from processes import run_command


def run(speed: str) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-m", speed]
    command = [sys.executable, "-m", "pytest", *options, "tests/pretended_gpu.py"]
    run_command(command, cwd=Path(__file__).parents[1])


@pytest.mark.slow
def test_probes_are_trained_and_used_on_a_pretended_gpu():
    run("not nightly")


@pytest.mark.nightly
def test_all_commands_and_families_on_a_pretended_gpu():
    run("nightly")
