"""Run `probes` in processes that are killed; they are forked off a server that has imported everything."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

from processes import HANGING_S, die

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["fault_server_imports"])

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def on_change(folder: Path, do: Callable[[int], None]) -> Callable[[], int]:
    """Call `do` with 1, 2, ... before each change of this process under `folder`; return a function with the count.

    A change opens a file for writing, renames, deletes or makes a folder; audit hooks report all of them.
    """
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        opens = event == "open" and (arguments[2] or 0) & WRITING
        if not opens and event not in CHANGES:
            return
        # To an open folder, as in shutil.rmtree
        relative = not opens and arguments[-1] not in (-1, None)
        if relative or str(arguments[0]).startswith(str(folder)):
            count += 1
            do(count)

    sys.addaudithook(hook)
    return lambda: count


def run(argv: list[str], log: Path, folder: Path | None = None, at: int = 0) -> None:
    """Run `probes ARGV`. With a folder, print the number of its changes, and kill the process before change `at`."""
    from probes.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    changes = on_change(folder, lambda count: die() if count == at else None) if folder else None
    main(argv)
    if changes:
        print(changes(), flush=True)


def process(*arguments) -> int:
    """Return the exit code of `run` in a new process, negative for a signal."""
    child = SERVER.Process(target=run, args=arguments)
    child.start()
    child.join(HANGING_S)
    if child.is_alive():
        child.kill()
        child.join(HANGING_S)
        raise TimeoutError(f"a run was killed after {HANGING_S} s")
    return child.exitcode
