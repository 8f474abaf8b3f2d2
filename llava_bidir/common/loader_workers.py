"""Worker processes of data loaders."""

import os
import signal
from multiprocessing.queues import Queue
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
        "worker_init_fn": prepare_worker,
    }


def prepare_worker(worker: int) -> None:
    """Leave Ctrl-C to the main process, and let it know of a batch that cannot be passed on.

    The main process may need more batches of its step; a terminal sends Ctrl-C to all. Batches wait in /dev/shm. Where
    it is full, the queue only prints the error, and the main process would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Queue._on_queue_feeder_error = _send_error


def _send_error(queue: Queue, error: Exception, item: tuple[int, Any]) -> None:
    """Send an error in place of an item of a loader's queue, which is the number of a batch and its content."""
    from torch._utils import ExceptionWrapper  # what a worker sends where a dataset raises

    try:
        raise UserError(
            f"a worker of the data loader cannot pass on its batch: {error}. Give the container more shared memory "
            "(docker run --shm-size 8g), or read without workers (--data.num_workers 0)"
        )
    except UserError:
        queue.put((item[0], ExceptionWrapper(where="in DataLoader worker process")))
