"""Worker processes of data loaders."""

import os
import signal
from typing import Any

from .errors import UserError


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    # macOS lacks the first
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def limit_workers(wanted: int | None) -> int:
    """Return the number of worker processes of a data loader, at most one per core.

    Raises:
        UserError: It is no number from 0.
    """
    if wanted is None or wanted < 0:
        raise UserError(f"data.num_workers must be 0 or more, got {wanted}")
    return min(wanted, usable_cores())


def worker_options(workers: int) -> dict[str, Any]:
    """Return the options of a `DataLoader` for so many worker processes.

    They are forked: datasets refer to processors and models, which other ways to start a process (the default of
    macOS, and of Python 3.14 on Linux) would have to pickle.
    """
    if not workers:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        "multiprocessing_context": "fork",
        "worker_init_fn": ignore_interrupt,
    }


def ignore_interrupt(worker: int) -> None:
    """Leave Ctrl-C to the main process, which may need more batches of its step; a terminal sends it to all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
