"""Processes of commands: several commands in one, and commands that end with all processes they have started."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from .errors import UserError

SEVERAL = "import json, sys; from {package}.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
# A command that was killed outright cannot end its processes: they end themselves.
WATCH = "import sys; from llava_bidir.common.process_group import end_with_parent; end_with_parent(int(sys.argv[2]))\n"
WATCH_S = 0.5
LOG_LINES = 20  # of a step that failed
Step = tuple[Path, list[str], Path | None]  # result, command of `llava-bidir`, and what it needs


def several_commands(package: str, commands: list[list[str]]) -> list[str]:
    """Return the words that run commands of a package in one process: importing takes as long as many of them.

    The process ends with this one, even if this one is killed: commands of the next call would meet it in their folder.
    """
    code = WATCH + SEVERAL.format(package=package)
    return [sys.executable, "-c", code, json.dumps(commands), str(os.getpid())]


def end_with_parent(parent: int) -> None:
    """Kill this process and its group as soon as its parent is another than the process `parent`."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def run_missing(out: Path, name: str, steps: list[Step]) -> None:
    """Run the commands of `llava-bidir` whose result is missing or older than what it needs, in one process.

    Args:
        out: Their output goes to OUT/logs/NAME.log.
        name: Of these steps together.
        steps: In order.

    Raises:
        UserError: A command has failed.
    """
    again: dict[Path, list[str]] = {}
    for result, command, needed in steps:
        outdated = needed in again or (
            needed and result.is_file() and needed.stat().st_mtime > result.stat().st_mtime
        )
        if outdated or not result.is_file():
            again[result] = command
    if not again:
        return
    log = out / "logs" / f"{name}.log"
    started = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name} begins, see {log}", flush=True)
    with log.open("w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        words = several_commands("llava_bidir", [*again.values()])
        with process_group(
            words,
            stdout=said,
            stderr=said,
            env=environment,
        ) as process:
            status = process.wait()
    if status < 0:
        raise UserError(
            f"{name} was ended by signal {-status}; the same command goes on where it stopped"
        )
    if status:
        print("\n".join(log.read_text().splitlines()[-LOG_LINES:]), file=sys.stderr)
        raise UserError(f"{name} has failed; all it said is in {log}")
    print(f"{time.perf_counter() - started:4.0f} s {name}", flush=True)


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
