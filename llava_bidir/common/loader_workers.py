"""Worker processes of data loaders."""

import os
from typing import Any


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS lacks the first


def worker_options(workers: int) -> dict[str, Any]:
    """Return the options of a `DataLoader` for so many worker processes.

    They are forked: datasets refer to processors and models, which other ways to start a process (the default of
    macOS, and of Python 3.14 on Linux) would have to pickle.
    """
    return {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
