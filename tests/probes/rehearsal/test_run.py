"""Steps of a rehearsal: failures, resuming, measurements, the extrapolation, and a rehearsal from start to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import HANGING_S, run_command

from llava_bidir.common.steps import find_missing, run_steps
from probes import cli
from probes.rehearsal import run as rehearsal
from probes.rehearsal.cost import extrapolate
from probes.rehearsal.inputs import ARMS
from probes.rehearsal.measure import run_measured
from probes.rehearsal.study import rehearsal_step
from probes.results.study import CONTROLS

ROOT = Path(__file__).parents[3]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_code(code: str) -> list[str]:
    """Return the command of a step, a module and its words, that runs code."""
    return ["timeit", "-n1", "-r1", code]


def test_failed_step_is_named_with_its_log_and_measured_and_the_rest_runs(tmp_path):
    """test_steps.py has what is run again."""
    bad = "block = bytearray(b'x') * 100_000_000; import time; time.sleep(1); raise SystemExit('the reason')"
    logs = tmp_path / "logs"
    steps = [
        rehearsal_step(tmp_path, "bad", run_code(bad)),
        rehearsal_step(tmp_path, "after_bad", run_code("print('fine')")),
    ]
    failed = run_steps(steps, logs, rehearsal.run_step)
    assert failed == [f"bad: SystemExit: the reason (its log is {logs}/bad.log)"]
    measured = [rehearsal.read_measurements(step, logs) for step in steps]
    assert [step["status"] for step in measured] == ["failed", "finished"]
    # of memory that did not suffice, the peak is what one wants
    assert measured[0]["host_gb"] > 0.09
    assert find_missing(steps, logs) == [steps[0]]


def test_memory_of_all_processes_is_counted_and_mapped_files_are_not(tmp_path):
    hold = "import time; block = bytearray(b'x') * 100_000_000; time.sleep(1)"
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; child.wait(60)"
    measured = run_measured(python(both), tmp_path / "log")
    assert 0.2 < measured["host_gb"] < 0.26
    assert measured["returncode"] == 0
    forked = f"import os; {hold.replace('time.sleep(1)', 'child = os.fork(); time.sleep(1)')}; child and os.wait()"
    measured = run_measured(python(forked), tmp_path / "log")
    assert 0.1 < measured["host_gb"] < 0.13, "memory that a forked process shares counts once"
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    mapped = f"import mmap, time; file = open({str(tmp_path / 'file')!r}, 'r+b'); m = mmap.mmap(file.fileno(), 0)"
    measured = run_measured(python(f"{mapped}; sum(m[::4096]); time.sleep(1)"), tmp_path / "log")
    assert measured["host_gb"] < 0.06
    assert measured["host_with_files_gb"] > 0.1


def test_cost_is_the_number_of_samples_at_the_measured_speed():
    steps = {
        "causal_stage2": {"step_s": 2.0, "samples": 128},
        "study": {"step_s": 0.5, "samples": 64},
    }
    stage, probes = extrapolate(steps | {"causal_stage1": {"status": "failed"}}, devices=8)
    assert stage["device_hours"] == pytest.approx(8 * 665_298 / 128 * 2 / 3600, abs=0.01), (
        "a step takes all devices"
    )
    assert probes["device_hours"] == pytest.approx(8 * 20 * 22_210 / 64 * 0.5 / 3600, abs=0.01)


def test_claims_about_the_llm_have_the_draws_of_a_verdict():
    needed = {f"{control}{draw}" for control in CONTROLS["llm"] for draw in range(2)}
    assert needed <= set(ARMS.split())


def test_folder_of_another_rehearsal_is_an_error(tmp_path, monkeypatch):
    # It would last for all tests after this one
    monkeypatch.setattr(rehearsal, "end_on_signals", lambda: None)
    inputs = ["rehearse", "--inputs-only", "--out", str(tmp_path)]
    cli.main([*inputs, "--size", "tiny"])
    others = {
        "size 'tiny', not '1b'": ["--size", "1b"],
        "encoder 'clip', not 'dinov2'": ["--size", "tiny", "--encoder", "dinov2"],
        "images 6, not 200": ["--size", "tiny", "--images", "200"],
    }
    for message, other in others.items():
        with pytest.raises(SystemExit, match=f"rehearsal.json is of {message}"):
            cli.main([*inputs, *other])


def test_fewer_images_than_the_solver_keeps_are_an_error(tmp_path):
    words = ["rehearse", "--out", str(tmp_path / "out"), "--size", "tiny", "--images", "2"]
    with pytest.raises(SystemExit, match="--images is 2; the solver keeps 2: expected more"):
        cli.main(words)
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
def test_tiny_rehearsal_is_killed_and_resumes_to_its_table(tmp_path):
    words = f"-m probes rehearse --out {tmp_path}/out --size tiny"
    command = [sys.executable, *words.split()]
    file = tmp_path / "out/rehearsal.json"
    first = subprocess.Popen(
        command,
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )

    def steps() -> dict[str, float]:
        found = json.loads(file.read_text())["steps"] if file.exists() else {}
        return {name: step["wall_s"] for name, step in found.items()}

    deadline = time.monotonic() + HANGING_S
    while len(steps()) < 2 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait(HANGING_S)
    before = steps()
    done = run_command(command, cwd=ROOT)
    assert done.stdout.count("certificates hold") == 2, "a mask each"
    record = json.loads(file.read_text())
    assert before
    assert all(record["steps"][name]["wall_s"] == seconds for name, seconds in before.items())
    assert {step["status"] for step in record["steps"].values()} == {"finished"}
    assert all(record["steps"][f"causal_{name}"]["step_s"] > 0 for name in ("stage1", "stage2"))
    stages = {f"{mask}_{x}" for mask in ("causal", "bidirectional") for x in ("stage1", "stage2")}
    assert {part["part"] for part in record["cost"]} == {"probes"} | stages
    claims = json.loads((tmp_path / "out/report/results.json").read_text())["claims"]
    assert {claim["claim"] for claim in claims} >= {"adapter_drop", "recovery"}
    beyond = [x["verdicts"]["beyond_random"] for x in claims if x["claim"] == "recovery"]
    assert all({*column["controls"]} == {"random", "permuted"} for column in beyond)
    assert "host GB" in done.stdout
    assert "device-hours" in done.stdout
