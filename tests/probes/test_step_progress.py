"""A running step says how far it is, and its estimate of the time left follows its pace."""

import sys
from types import SimpleNamespace

import pytest
from processes import run_command

from probes.steps import progress
from probes.steps.progress import StepWatcher


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def watcher(**seconds: float) -> StepWatcher:
    return StepWatcher(
        name="before/trained", kind="solve", later=("solve", "report"), seconds=seconds
    )


def test_a_step_that_is_slower_than_earlier_ones_lengthens_the_estimate(clock):
    watch = watcher(solve=240.0, report=60.0)
    assert watch("solving sites", 0, 4) == "about 9 min left", "four, four and one"
    clock.now += 60
    assert watch("solving sites", 1, 4) == "about 8 min left", "as expected"
    clock.now += 180
    assert watch("solving sites", 2, 4) == "about 9 min left", "four more of this step, not none"


REDIRECTED = """
import os, sys
from probes.steps import progress
with progress.output_of_command() as lines:
    os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), 1)
    print("to the log", flush=True)
    print("to the command", file=lines, flush=True)
"""


def test_lines_reach_the_output_of_the_command_while_that_of_a_step_is_redirected(tmp_path):
    command = [sys.executable, "-c", REDIRECTED, tmp_path / "log"]
    assert run_command(command).stdout == "to the command\n"
    assert (tmp_path / "log").read_text() == "to the log\n"
