"""The processes of a run: collectives, what only the first one says, and workers of data loaders."""

import logging
import os
import signal
import warnings
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper

from .errors import UserError

log = logging.getLogger(__name__)
# what a command says, whatever the level of a notebook's or a test's root logger
log.setLevel(logging.INFO)


def rank_count() -> int:
    """Return the number of processes of this run."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def rank() -> int:
    """Return the index of this process."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def all_gather(x: Tensor) -> Tensor:
    """Return the tensor of every process, f[R, ...], without gradient; f[1, ...] in a single process."""
    if rank_count() == 1:
        return x[None]
    tensors = [torch.empty_like(x) for _ in range(rank_count())]
    torch.distributed.all_gather(tensors, x.contiguous())
    return torch.stack(tensors)


def broadcast(x: Any, source: int) -> Any:
    """Return the object of process `source`.

    Args:
        x: Object of this process, which may contain tensors on the CPU.
        source: Process whose object it is.
    """
    if rank_count() == 1:
        return x
    box = [x]
    torch.distributed.broadcast_object_list(box, source)
    return box[0]


def all_gather_objects(x: Any) -> list[Any]:
    """Return the object of every process."""
    if rank_count() == 1:
        return [x]
    parts: list[Any] = [None] * rank_count()
    torch.distributed.all_gather_object(parts, x)
    return parts


def decide_on_first(function: Callable[..., Any], *args: Any) -> Any:
    """Return the first process's `function(*args)` on every process; its UserError is raised on every process."""
    result = None
    error = None
    if rank() == 0:
        try:
            result = function(*args)
        except UserError as raised:
            error = str(raised)
    result, error = broadcast((result, error), 0)
    if error is not None:
        raise UserError(error)
    return result


def _is_first() -> bool:
    if torch.distributed.is_initialized():
        return rank() == 0
    # as torchrun, Slurm and Lightning tell it before the processes have met
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    told = (os.environ[name] for name in names if name in os.environ)
    return next(told, "0") == "0"


def rank_zero_info(message: str) -> None:
    """Log a message once for all processes."""
    if _is_first():
        log.info(message)


def rank_zero_warn(message: str) -> None:
    """Warn once for all processes."""
    if _is_first():
        warnings.warn(message, stacklevel=2)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()  # macOS


def worker_options(workers: int) -> dict[str, Any]:
    """Return the options of a `DataLoader` for so many worker processes.

    They are forked: datasets refer to processors and models, which other ways to start a process (the default of
    macOS, and of Python 3.14 on Linux) would have to pickle.
    """
    return {
        "num_workers": workers,
        "multiprocessing_context": "fork" if workers else None,
        "worker_init_fn": prepare_worker,
    }


def prepare_worker(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all, to the main process, which may need more batches of its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_lost_results(worker)


def report_lost_results(worker: int) -> None:
    """Send an error in place of a result that this worker cannot send, for which the main process would wait for ever.

    Python's thread that sends results prints why it drops one, mostly that /dev/shm is full, and goes on.
    """

    def send_error(queue: Queue, error: Exception, result: tuple[int, Any]) -> None:
        number, _ = result
        reason = UserError(
            f"a worker of a data loader cannot send its results: {error}; where shared memory is full, enlarge "
            "/dev/shm (docker run --shm-size), or use no workers (data.num_workers 0)"
        )
        where = f"in DataLoader worker process {worker}"
        queue.put((number, ExceptionWrapper((UserError, reason, None), where)))

    Queue._on_queue_feeder_error = send_error
