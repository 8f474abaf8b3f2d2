"""Run steps that are commands in a process of their own, with their output in a log."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava_bidir.common.errors import UserError
from llava_bidir.common.imports import import_words
from llava_bidir.common.process_group import WATCH, process_group
from llava_bidir.common.steps import Step, command_now, find_missing, run_steps

LOG_LINES = 20  # of a process that failed
# Importing takes as long as many commands, so that several of them share a process.
IN_CHILD_PROCESS = (
    WATCH + "import llava_bidir.cli, probes.cli; from importlib import import_module; "
    "from probes.worlds.child_process import run_given; "
    "run_given(sys.argv[1], {'llava-bidir': llava_bidir.cli.main, 'probes': probes.cli.main, "
    "'python': lambda words: import_module(words[1]).main(words[2:])})"
)


def run_in_child_process(out: Path, name: str, steps: Sequence[Step]) -> None:
    """Run what is missing of steps in one process on one thread.

    The process ends with this one, even if this one is killed: steps of the next call would meet it in their folder.

    Args:
        out: The output goes to OUT/logs/NAME.log, records to OUT/logs/steps.
        name: Of these steps together.
        steps: In order.

    Raises:
        UserError: A command has failed.
    """
    folder = out / "logs"
    missing = find_missing(steps, folder)
    if not missing:
        return
    log = folder / f"{name}.log"
    started = time.perf_counter()
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{name} begins, see {log}", flush=True)
    given = [str(folder), [vars(step) for step in missing], import_words()]
    given = json.dumps(given, default=str)
    command = [sys.executable, "-c", IN_CHILD_PROCESS, given, str(os.getpid())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        log.open("w") as said,
        process_group(command, stdout=said, stderr=said, env=environment) as process,
    ):
        status = process.wait()
    if status < 0:
        raise UserError(
            f"{name} was ended by signal {-status}; the same command goes on where it stopped"
        )
    if status:
        print("\n".join(log.read_text().splitlines()[-LOG_LINES:]), file=sys.stderr)
        raise UserError(f"{name} has failed; all it said is in {log}")
    print(f"{time.perf_counter() - started:4.0f} s {name}", flush=True)


def run_given(given: str, mains: Mapping[str, Callable[[list[str]], None]]) -> None:
    """Run steps that `run_in_child_process` has given as JSON, each by the main function of its program, by name."""
    folder, found, imports = json.loads(given)
    folder = Path(folder)
    steps = [
        Step(
            **fields
            | {
                "config": tuple(fields["config"]),
                "result": Path(fields["result"]),
                "reads": {name: Path(file) for name, file in fields["reads"].items()},
            }
        )
        for fields in found
    ]

    def run(step: Step) -> None:
        program, *words = command_now(step, folder)
        mains[program]([*words, *imports])

    run_steps(steps, folder, run)
