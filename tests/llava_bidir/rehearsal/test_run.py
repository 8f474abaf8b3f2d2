"""Steps of a rehearsal: failures, resuming, measurements, the extrapolation, and a rehearsal from start to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import HANGING_S

from llava_bidir import cli
from llava_bidir.common.steps import find_missing, run_steps
from llava_bidir.rehearsal import run as rehearsal
from llava_bidir.rehearsal.cost import extrapolate
from llava_bidir.rehearsal.measure import run_measured
from llava_bidir.rehearsal.study import rehearsal_step

ROOT = Path(__file__).parents[3]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_code(code: str) -> list[str]:
    """Return the command of a step, a module and its words, that runs code."""
    return ["timeit", "-n1", "-r1", code]


def test_failed_step_is_named_with_its_log_and_the_rest_runs(tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x')"
    bad = "block = bytearray(b'x') * 100_000_000; import time; time.sleep(1); raise SystemExit('the reason')"
    commands = {
        "good": run_code(count),
        "bad": run_code(bad),
        "after_bad": run_code(count),
    }
    logs = tmp_path / "logs"
    afterwards: list[list[str]] = []

    def rehearse() -> tuple[list[str], dict[str, dict]]:
        steps = [rehearsal_step(tmp_path, name, words) for name, words in commands.items()]

        def measured() -> dict[str, dict]:
            found = {step.name: rehearsal.read_measurements(step, logs) for step in steps}
            return {name: entry for name, entry in found.items() if entry}

        failed = run_steps(
            find_missing(steps, logs),
            logs,
            rehearsal.run_step,
            after=lambda: afterwards.append([*measured()]),
        )
        return failed, measured()

    failed, first = rehearse()
    assert failed == [f"bad: SystemExit: the reason (its log is {logs}/bad.log)"]
    assert [step["status"] for step in first.values()] == ["finished", "failed", "finished"]
    assert first["bad"]["host_gb"] > 0.09, (
        "of memory that did not suffice, the peak is what one wants"
    )
    assert afterwards == [["good"], ["good", "bad"], ["good", "bad", "after_bad"]]
    commands["bad"] = run_code("print('mended')")
    failed, second = rehearse()
    assert not failed and {step["status"] for step in second.values()} == {"finished"}
    assert second["good"] == first["good"] and "wall_s" in second["good"]
    assert (tmp_path / "count").read_text() == "xx", "finished steps are not run again"


def test_memory_of_all_processes_is_counted_and_mapped_files_are_not(tmp_path):
    hold = "import time; block = bytearray(b'x') * 100_000_000; time.sleep(2)"
    both = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {hold!r}]); {hold}; child.wait(60)"
    measured = run_measured(python(both), tmp_path / "log")
    assert 0.2 < measured["host_gb"] < 0.26 and measured["returncode"] == 0
    forked = f"import os; {hold.replace('time.sleep(2)', 'child = os.fork(); time.sleep(2)')}; child and os.wait()"
    measured = run_measured(python(forked), tmp_path / "log")
    assert 0.1 < measured["host_gb"] < 0.13, "memory that a forked process shares counts once"
    (tmp_path / "file").write_bytes(bytes(100_000_000))
    mapped = f"import mmap, time; file = open({str(tmp_path / 'file')!r}, 'r+b'); m = mmap.mmap(file.fileno(), 0)"
    measured = run_measured(python(f"{mapped}; sum(m[::4096]); time.sleep(1)"), tmp_path / "log")
    assert measured["host_gb"] < 0.06 and measured["host_with_files_gb"] > 0.1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_and_its_processes_end_with_the_rehearsal(tmp_path, number):
    worker = "import time, os; open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'started'); time.sleep(600)"
    code = f"import subprocess; subprocess.run({python(worker)!r})"
    lines = [
        # nohup ignores SIGHUP, and its children too
        f"import signal; signal.signal({int(number)}, signal.SIG_DFL)",
        "from llava_bidir.common.process_group import end_on_signals; end_on_signals()",
        "from pathlib import Path; from llava_bidir.rehearsal.measure import run_measured",
        f"run_measured({python(code)!r}, Path('log'))",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rehearsing = subprocess.Popen(python("\n".join(lines)), cwd=tmp_path, env=environment)
    deadline = time.monotonic() + HANGING_S
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        rehearsing.send_signal(number)
        assert rehearsing.wait(timeout=60) == 128 + number
    finally:
        rehearsing.kill()
    worker_pid = int((tmp_path / "started").read_text())
    while psutil.pid_exists(worker_pid) and time.monotonic() < deadline:  # init reaps it
        time.sleep(0.05)
    assert not psutil.pid_exists(worker_pid)


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


def test_certificates_of_solved_probes_are_described(tmp_path):
    true = {
        "gradient": 2e-4,
        "decrease": 1e-6,
        "converged": True,
    }
    false = {
        "gradient": 5e-2,
        "decrease": 3e-3,
        "converged": False,
    }
    sites = [{"certificates": [true, None]}, {"certificates": [false, None]}]
    path = {
        "passes": 4,
        "sample_images": 2,
        "optimum": {"sites": sites},
    }
    (tmp_path / "causal/trained").mkdir(parents=True)
    (tmp_path / "causal/trained/metrics.json").write_text(json.dumps({"path": path}))
    (line,) = rehearsal.describe_certificates(tmp_path)
    assert "causal: probes of 2 images' memory after 4 passes: 1 of 2 certificates hold" in line
    assert "gradients are at most 5.0e-02, decreases 3.0e-03 nats" in line


def test_folder_of_another_size_is_an_error(tmp_path, monkeypatch):
    # It would last for all tests after this one
    monkeypatch.setattr(rehearsal, "end_on_signals", lambda: None)
    inputs = ["rehearse", "--inputs-only", "--out", str(tmp_path)]
    cli.main([*inputs, "--size", "tiny"])
    others = {
        "size 'tiny', not '1b'": ["--size", "1b"],
        "encoder 'clip', not 'dinov2'": ["--size", "tiny", "--encoder", "dinov2"],
    }
    for message, other in others.items():
        with pytest.raises(SystemExit, match=f"rehearsal.json is of {message}"):
            cli.main([*inputs, *other])


@pytest.mark.nightly
def test_tiny_rehearsal_is_killed_and_resumes_to_its_table(tmp_path):
    command = [
        sys.executable,
        "-m",
        "llava_bidir",
        "rehearse",
        "--out",
        str(tmp_path / "out"),
        "--size",
        "tiny",
    ]
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
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("certificates hold") == 2, "a mask each"
    record = json.loads(file.read_text())
    assert before
    assert all(record["steps"][name]["wall_s"] == seconds for name, seconds in before.items())
    assert {step["status"] for step in record["steps"].values()} == {"finished"}
    assert all(record["steps"][f"causal_{name}"]["step_s"] > 0 for name in ("stage1", "stage2"))
    assert {part["part"] for part in record["cost"]} == {
        "probes",
        *(
            f"{mask}_{part}"
            for mask in ("causal", "bidirectional")
            for part in ("stage1", "stage2")
        ),
    }
    claims = json.loads((tmp_path / "out/report/results.json").read_text())["claims"]
    assert {claim["claim"] for claim in claims} >= {"adapter_drop", "recovery"}
    assert "host GB" in done.stdout and "device-hours" in done.stdout
