"""Processes that tests start and kill; most are forked, which avoids importing torch again."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

# limit of a wait that ends by itself on a slow or busy machine, too; below DDP's timeout of 30 min
HANGING_S = 1200


def run_command(command: list, must_pass: bool = True, **options) -> subprocess.CompletedProcess:
    """Run a command to its end and return what it said; exit codes other than 0 are failures unless they are wanted."""
    settings = {"capture_output": True, "text": True, "timeout": HANGING_S}
    done = subprocess.run([str(word) for word in command], **settings | options)
    assert done.returncode == 0 or not must_pass, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done


def fork(run: Callable[[], None], log: Path | None = None) -> int:
    """Return the id of a process that calls `run` and exits with 0, or 1 if it raises; output goes to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if log:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2, sys.stdout.fileno(), sys.stderr.fileno()):
                os.dup2(output, stream)
            logging.root.handlers.clear()  # pytest's, as were the streams
        # A forked process replaces torch's thread pool at its first parallel operation. If two threads do so at once,
        # as when transformers reads weights, one of them can find no pool ("Invalid thread pool!").
        torch.set_num_threads(torch.get_num_threads())
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(child: int) -> int:
    """Return the exit status, negative for a signal; kill a child that hangs, which is an error."""
    status = _status(child, HANGING_S)
    if status is None:
        os.kill(child, signal.SIGKILL)
        raise TimeoutError(
            f"process {child} did not end within {HANGING_S} s; {_status(child, HANGING_S)}"
        )
    return status


def kill_after(seconds: float, child: int) -> int:
    """Kill the child unless it ends in time, and return its exit status."""
    status = _status(child, seconds)
    if status is None:
        os.kill(child, signal.SIGKILL)
        return wait(child)
    return status


def _status(child: int, seconds: float) -> int | None:
    """Return the exit status of a child that ends in time, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


@contextmanager
def inside(context) -> Iterator[int]:
    """Yield the id of a process that stays inside `context`; it is killed at the end."""
    ready, tell = os.pipe()

    def stay() -> None:
        with context:
            os.write(tell, b"x")
            time.sleep(600)

    child = fork(stay)
    os.close(tell)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    try:
        yield child
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            wait(child)
        except (ProcessLookupError, ChildProcessError):
            pass  # the test has killed it


def run_ranks(run: Callable[[], None], folder: Path, processes: int = 2) -> tuple[list[int], str]:
    """Call `run` once per rank, each in a process with the variables that torchrun sets.

    Args:
        run: The same for every rank.
        folder: Where the log of each rank is written.
        processes: Number of ranks, on this machine.

    Returns:
        Exit code of each rank, negative for a signal, and the ends of their logs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "test",
    }

    def run_rank(rank: int) -> None:
        variables = group | {"RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({key: str(value) for key, value in variables.items()})
        run()

    logs = [folder / f"{rank}.log" for rank in range(processes)]
    running = [fork(partial(run_rank, rank), log) for rank, log in enumerate(logs)]
    codes = []
    try:
        for child in running:
            codes.append(wait(child))
    finally:
        for child in running[len(codes) + 1 :]:  # after one that has hung
            os.kill(child, signal.SIGKILL)
    return codes, "\n".join(log.read_text()[-3000:] for log in logs)
