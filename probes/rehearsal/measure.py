"""Run a command and measure the memory of its processes; read the speed of a training from its events."""

import shutil
import subprocess
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llava_bidir.common.process_group import process_group

INTERVAL_S = 0.2  # between two looks at the memory; a model that is read stays for longer
LOOKS = 0.05  # largest share of the time spent looking: the system walks all pages, 0.1 s for 10 GB
NAMES = ("step_s", "tokens_per_s", "samples_per_s", "memory_gb")
QUERY = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


def run_measured(command: list[str], log: Path) -> dict[str, float | int]:
    """Run a command with its output in a log.

    Returns:
        {"returncode", "wall_s", "host_gb", "host_with_files_gb"}, and "device_gb" of the fullest GPU if there are any.
        `host_gb` is the peak of the memory that only the processes hold. The other one counts mapped checkpoints too,
        which the system drops when memory is short.
    """
    peaks: dict[str, float] = {}
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        print(*command, file=output, flush=True)
        done = threading.Event()
        with process_group(command, stdout=output, stderr=subprocess.STDOUT) as process:
            watch = threading.Thread(
                target=_watch,
                args=(process.pid, peaks, done),
                daemon=True,
            )
            watch.start()
            try:
                code = process.wait()
            finally:
                done.set()
                watch.join()
    return {"returncode": code, "wall_s": round(time.monotonic() - start, 1)} | {
        name: round(peak / 1e9, 3) for name, peak in peaks.items()
    }


def _watch(pid: int, peaks: dict[str, float], done: threading.Event) -> None:
    """Update the peaks of all processes that `pid` has started, until `done`."""
    has_gpu = shutil.which(QUERY[0]) is not None
    pause = INTERVAL_S
    while not done.wait(pause):
        start = time.monotonic()
        private = 0
        mapped = 0
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(pid)
            for process in [parent, *parent.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    of_process = _read_memory(process)
                    private = private + of_process[0]
                    mapped = mapped + of_process[1]
        held = {"host_gb": private, "host_with_files_gb": mapped}
        if has_gpu:
            lines = subprocess.run(QUERY, capture_output=True, text=True).stdout.split()
            held["device_gb"] = max(
                (float(line) * 2**20 for line in lines if line.isdigit()), default=0
            )
        peaks |= {name: max(value, peaks.get(name, 0)) for name, value in held.items()}
        pause = max(INTERVAL_S, (time.monotonic() - start) / LOOKS)


def _read_memory(process: psutil.Process) -> tuple[int, int]:
    """Return the bytes that a process holds, without and with mapped files.

    What processes share, such as the weights of a training with its forked loaders, is split between them (Linux: Pss),
    so that a sum over processes counts it once.
    """
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if not rollup.exists():  # another system
        memory = process.memory_info()
        return memory.rss, memory.rss
    kilobytes = {
        words[0]: int(words[1])
        for line in rollup.read_text().splitlines()[1:]
        if (words := line.split())
    }
    return 1024 * (kilobytes["Pss_Anon:"] + kilobytes["Pss_Shmem:"]), 1024 * kilobytes["Pss:"]


def read_speed(run: Path) -> dict[str, float]:
    """Return the speed of a training from its events: medians over all logged steps but the first, which warms up.

    The keys are `step_s` and those of NAMES that the training logs. Without `step_s` among the events, it is the
    median time between two of them.
    """
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    values = {
        name: [event.value for event in events.Scalars(f"train/{name}")]
        for name in NAMES
        if f"train/{name}" in tags
    }
    losses = [tag for tag in tags if "train_loss" in tag]
    if "step_s" not in values and losses:
        times = [event.wall_time for event in events.Scalars(losses[0])]
        values["step_s"] = [after - before for before, after in pairwise(times)]
    return {name: median(steps[1:] or steps) for name, steps in values.items() if steps}
