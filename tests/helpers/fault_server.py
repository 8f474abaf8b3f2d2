"""`probes` in processes that meet with an accident. They are forked off a server that has imported everything, so that
one takes no longer than its work."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fault_server_imports"])

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def on_change(folder: Path, do: Callable[[int], None]) -> Callable[[], int]:
    """Counts the changes so far; calls `do` with 1, 2, ... each time before this process changes anything under
    `folder`: opens a file to write, renames, deletes, makes a folder. Python tells of each, whoever asked for it
    (sys.addaudithook)."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        opens = event == "open" and (arguments[2] or 0) & WRITING
        if not opens and event not in CHANGES:
            return
        relative = not opens and arguments[-1] not in (-1, None)  # to an open folder, as shutil.rmtree has it
        if relative or str(arguments[0]).startswith(str(folder)):
            count += 1
            do(count)

    sys.addaudithook(hook)
    return lambda: count


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(argv: list[str], log: Path, folder: Path | None = None, at: int = 0) -> None:
    """`probes ARGV`. With a folder it ends by saying how often it changed that; before the `at`-th time it dies."""
    from probes.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    changes = on_change(folder, lambda count: die() if count == at else None) if folder else None
    main(argv)
    if changes:
        print(changes(), flush=True)


def process(*arguments, kill_after_s: float | None = None) -> int:
    """Exit code of `run` in a process of its own; the negative signal if one killed it."""
    child = SERVER.Process(target=run, args=arguments)
    child.start()
    child.join(kill_after_s)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode
