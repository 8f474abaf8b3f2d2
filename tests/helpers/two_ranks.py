"""Commands on two processes, which run all of them one after the other."""

import os
import socket
import sys
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path

from processes import run_ranks

RANKS = 2
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
MARK = "-------- command "


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, one for the meeting of each command."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def run(commands: dict[str, list[str]], folder: Path) -> dict[str, str]:
    """Run commands by name, each with its package first; return what both processes said of each, errors included."""
    ports = free_ports(len(commands))
    codes, ends = run_ranks(partial(_run_all, commands, ports), folder)
    assert codes == [0] * RANKS, ends
    logs = [(folder / f"{rank}.log").read_text() for rank in range(RANKS)]
    said = dict.fromkeys(commands, "")
    for log in logs:
        for part in log.split(MARK)[1:]:
            name, _, text = part.partition("\n")
            said[name] += text
    return said


def _run_all(commands: dict[str, list[str]], ports: list[int]) -> None:
    for (name, (package, *argv)), port in zip(commands.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        print(f"{MARK}{name}", file=sys.stderr, flush=True)
        try:
            import_module(f"{package}.cli").main(argv)
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)
