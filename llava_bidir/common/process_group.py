"""Processes of commands: several commands in one, and commands that end with all processes they have started."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

SEVERAL = "import json, sys; from {package}.cli import main; [main(words) for words in json.loads(sys.argv[1])]"


def several_commands(package: str, commands: list[list[str]]) -> list[str]:
    """Return the words that run commands of a package in one process: importing takes as long as many of them."""
    return [sys.executable, "-c", SEVERAL.format(package=package), json.dumps(commands)]


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
