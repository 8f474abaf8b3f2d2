"""Processes of commands, which end with all processes that they have started."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

WATCH_S = 0.5


def end_with_parent(parent: int) -> None:
    """Kill this process and its group as soon as its parent is another than the process `parent`.

    A command that was killed outright cannot end its processes: they end themselves.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def process_group(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a command in a process group of its own; on leaving the context, kill what is left of the group.

    Ctrl-C in a terminal reaches the caller only; `end_on_signals` passes it on.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    _started.append(process)
    try:
        yield process
    finally:
        _send(process, signal.SIGKILL)
        process.wait()
        _started.remove(process)


_started: list[subprocess.Popen] = []  # leaders of the groups that run now, also of other threads


def _send(process: subprocess.Popen, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # none is left; macOS: only zombies are
        os.killpg(process.pid, number)


def end_on_signals() -> None:
    """End with all process groups on SIGTERM and, unless `nohup` ignores it, on SIGHUP of a closed terminal.

    Ctrl-C is passed on to the groups, where a training saves a checkpoint after its step. The main thread may wait for
    threads that wait for the groups, so that the handlers end these themselves.

    Raises:
        SystemExit: On a signal, with status 128 plus its number; KeyboardInterrupt on Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for process in list(_started):
        _send(process, signal.SIGINT if number == signal.SIGINT else signal.SIGKILL)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
