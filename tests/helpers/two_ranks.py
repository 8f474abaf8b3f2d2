"""Commands of `probes` on two processes, which run all of them one after the other, because imports are slow.

`run` starts the processes; each one is `python two_ranks.py FILE`, as torchrun starts them.
"""

import json
import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from processes import run_ranks

RANKS = 2
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on, one for the meeting of each command."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def run(commands: dict[str, list[str]], folder: Path, timeout_s: int) -> dict[str, str]:
    """Run commands by name on two processes, and return what both said of each; errors are a part of it."""
    file = folder / "commands.json"
    ports = free_ports(len(commands))
    file.write_text(
        json.dumps([[*item, port] for item, port in zip(commands.items(), ports, strict=True)])
    )
    codes, ends = run_ranks([sys.executable, __file__, str(file)], folder, RANKS, timeout_s)
    assert codes == [0] * RANKS, ends
    logs = [(folder / f"{rank}.log").read_text() for rank in range(RANKS)]
    said = dict.fromkeys(commands, "")
    for log in logs:
        for part in log.split(MARK)[1:]:
            name, _, text = part.partition("\n")
            said[name] += text
    return said


MARK = "-------- command "


def main() -> None:
    root = Path(__file__).parents[2]
    sys.path.insert(0, str(root))
    from probes.cli import main as run_command

    for name, argv, port in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        print(f"{MARK}{name}", file=sys.stderr, flush=True)
        try:
            run_command(argv)
        except SystemExit as error:
            print(error, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
