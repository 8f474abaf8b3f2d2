"""What a process holds and held at most, as Linux counts it."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def memory_mb(kind: str, pid: int | str = "self") -> float:
    """VmRSS now, VmHWM at most, or RssAnon: what is not a mapped file and cannot be given
    back."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    # 0 of one that has ended
    return next((int(line.split()[1]) for line in lines if line.startswith(kind)), 0) / 1024


def peak_mb(function: Callable[[], object]) -> float:
    """By how much a call raises this process's memory at most. What a first call allocates for good should be there."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = memory_mb("VmRSS")
    function()
    return round(memory_mb("VmHWM") - before, 1)


class Watch:
    """What this process and its children hold while a block runs, in tenths of its time but the first and the last, in
    which workers start and end."""

    def __enter__(self) -> "Watch":
        self.start = time.perf_counter()
        self.samples = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        me = os.getpid()
        children = Path(f"/proc/{me}/task/{me}/children")
        while not self._done.wait(0.1):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one has just ended
                held = [memory_mb("RssAnon", pid) for pid in (me, *children.read_text().split())]
                self.samples.append((time.perf_counter() - self.start, sum(held)))

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.perf_counter() - self.start

    def facts(self, records: int) -> dict:
        """Rate and memory of a block that took these records in turn."""
        kept = [sample for sample in self.samples if 0.1 < sample[0] / self.seconds < 0.9]
        when, held = np.array(kept).T
        tenth = (10 * when / self.seconds).astype(int)
        return {
            "seconds": round(self.seconds, 1),
            "records_per_s": round(records / self.seconds),
            "held_mb": [round(float(held[tenth == i].mean()), 1) for i in np.unique(tenth)],
        }
