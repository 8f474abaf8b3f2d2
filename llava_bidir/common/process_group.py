"""Processes of commands: several commands in one, and commands that end with all processes they have started."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError

SEVERAL = "import json, sys; from {package}.cli import main; [main(words) for words in json.loads(sys.argv[1])]"
LOG_LINES = 20  # of a step that failed
Step = tuple[Path, list[str], Path | None]  # result, command of `llava-bidir`, and what it needs


def several_commands(package: str, commands: list[list[str]]) -> list[str]:
    """Return the words that run commands of a package in one process: importing takes as long as many of them."""
    return [sys.executable, "-c", SEVERAL.format(package=package), json.dumps(commands)]


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
        outdated = needed in again or (needed and result.is_file() and needed.stat().st_mtime > result.stat().st_mtime)
        if outdated or not result.is_file():
            again[result] = command
    if not again:
        return
    log, started = out / "logs" / f"{name}.log", time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name} begins, see {log}", flush=True)
    with log.open("w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            several_commands("llava_bidir", [*again.values()]), stdout=said, stderr=said, env=environment
        )
    if done.returncode:
        print("\n".join(log.read_text().splitlines()[-LOG_LINES:]), file=sys.stderr)
        raise UserError(f"{name} has failed; all it said is in {log}")
    print(f"{time.perf_counter() - started:4.0f} s {name}", flush=True)


@contextmanager
def process_group(command: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a command in a process group of its own; on leaving the context, kill what is left of the group.

    Ctrl-C in a terminal reaches the caller only, and ends the group on the way out.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError, PermissionError):  # none is left; macOS: only zombies are
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_on_signals() -> None:
    """Exit on SIGTERM and, unless `nohup` ignores it, on SIGHUP of a closed terminal; contexts end on the way out."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
