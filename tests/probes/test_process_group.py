"""Steps in processes of their own end with the command that started them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
# what a step does instead: a process that starts another one and sleeps, and ends by itself on Ctrl-C only
STEP = """
import os, subprocess, sys, time
from probes.compute.process_group import end_with_parent
end_with_parent(int(sys.argv[1]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(f"pids_{os.getpid()}", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(file.name, f"started_{os.getpid()}")
try:
    time.sleep(600)
except KeyboardInterrupt:
    child.kill()
    open("asked", "a").write("x")
"""
DEMO = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from probes.compute import process_group
from probes.steps.record import Step
from probes.worlds import steps
from llava_bidir.common.errors import one_line_errors
steps.CHILD_PROCESS = ("-c", {step!r})
with one_line_errors("demo", ["demo"]):
    process_group.end_on_signals()
    with ThreadPoolExecutor(2) as pool:
        def run(name):
            steps.run_in_child_process(Path("."), name, [Step(name, (), Path(name), "fit")])
        list(pool.map(run, ["a", "b"]))
"""


def wait_until(condition) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.nightly),
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
        signal.SIGKILL,
    ],
)
def test_steps_of_several_threads_end_with_the_command(number, tmp_path):
    """`kill PID` of `probes demo` left the trainings running; the command waits for them in threads."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    reset = ""
    if number != signal.SIGKILL:
        reset = f"import signal; signal.signal({int(number)}, signal.default_int_handler)\n"
    words = [sys.executable, "-c", reset + DEMO.format(step=STEP)]
    demo = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert wait_until(lambda: len([*tmp_path.glob("started_*")]) == 2)
        demo.send_signal(number)
        told = demo.communicate(timeout=PATIENCE_S)[1]
    finally:
        demo.kill()
        started = tmp_path.glob("started_*")
        pids = [int(pid) for file in started for pid in file.read_text().split()]
        ended = wait_until(lambda: not any(map(psutil.pid_exists, pids)))
        for pid in filter(psutil.pid_exists, pids):
            os.kill(pid, signal.SIGKILL)
    expected = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    assert demo.returncode == expected.get(number, 128 + number)
    assert len(pids) == 4
    assert ended
    if number == signal.SIGINT:
        assert (tmp_path / "asked").read_text() == "xx", "a training saves a checkpoint then"
        assert told == "demo: interrupted; run the same command again to go on\n"
