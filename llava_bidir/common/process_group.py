"""A command that ends with all processes it has started."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


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
