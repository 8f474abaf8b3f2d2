"""The commands of probe runs: fit, solve, verify-data. Their options are those of `run_config.py`.

LightningCLI parses `fit`, as users of Lightning know it. Help, and errors about options, come
before it is imported.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from llava_bidir.common import usage_errors
from llava_bidir.common.configs import with_config_paths
from llava_bidir.common.option_names import check_options
from llava_bidir.common.short_help import HELP, HELP_ALL


class RunCommand(NamedTuple):
    """A command of a probe run.

    Args:
        help: A line in the list of commands.
        description: What it does.
        example: A command that works.
    """

    help: str
    description: str
    example: str


RUN_COMMANDS = {
    "fit": RunCommand(
        "train a probe at every site: -c ade20k --model.mllm DIR --data.root DIR --out RUN",
        "Train a probe at every site of a model, as the paper does. `probes solve` is faster and needs no recipe.",
        "probes fit -c ade20k --model.mllm MODEL --data.root ADEChallengeData2016 --out runs/mine",
    ),
    "solve": RunCommand(
        "solve a probe at every site at the optimum of its regularised loss; options as for fit",
        "Solve linear probes of all sites at the optimum of their loss, with the strength of regularisation that "
        "cross-validation chooses. Depth and normals are least squares. `probes study` does this for a model and its "
        "random controls.",
        "probes solve --model.mllm MODEL --data.root DATA --out runs/mine",
    ),
    "verify-data": RunCommand(
        "read every image and target before training: -c ade20k --data.root DIR",
        "Read every image and target of both splits; exit with status 1 if any cannot be used. All other options are "
        "those of `probes fit`; the model is not needed.",
        "probes verify-data -c folder --data.root DATA",
    ),
}


def main(argv: Sequence[str]) -> None:
    """Run one of the commands."""
    command, *words = argv
    {
        "fit": fit,
        "solve": solve,
        "verify-data": verify_data,
    }[command](words)


def _parser(command: str, **keywords):
    from .run_parser import RunParser  # jsonargparse

    _, description, example = RUN_COMMANDS[command]
    return RunParser(f"probes {command}", description, example, **keywords)


def solve(words: Sequence[str]) -> None:
    """Run `probes solve`."""
    parser = _parser("solve")
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory and hours, measured on a few images"
    )
    values = parser.read(words)
    config = parser.run_config(values)

    from probes.solve import command

    if values.dry_run:
        command.dry_run(config)
    else:
        command.run_config(config)


def verify_data(words: Sequence[str]) -> None:
    """Run `probes verify-data`."""
    parser = _parser("verify-data", optional=["model.mllm"])
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    values = parser.read(words)
    config = parser.run_config(values, model={"mllm": ""})
    if values.workers is not None and values.workers < 0:
        parser.error(f"argument --workers: expected at least 0, got {values.workers}")

    from probes.data.verify_command import verify

    verify(config.data, values.workers)


def fit(words: Sequence[str]) -> None:
    """Run `probes fit`."""
    parser = _parser("fit", solver=False)
    if any(word in HELP for word in words):
        print(
            f"{parser.format_help()}\nAll options, with those of Lightning: {parser.prog} {HELP_ALL}"
        )
        sys.exit(0)
    usage_errors.SHORT_HELP.add(parser.prog)
    words = ["--help" if word == HELP_ALL else word for word in with_config_paths(words)]
    check_options(parser.prog, words, parser.options_of_fit, parser.required)

    from probes.fit.cli import main as run_lightning

    run_lightning(["fit", *words])
