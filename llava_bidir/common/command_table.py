"""A table of commands: their parsers, and the call of the one that was chosen."""

import argparse
from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

from .options import add_options, read_options


class Command(NamedTuple):
    """A command with options of its own.

    Args:
        run: "module:function", imported when the command runs, which takes the options.
        help: A sentence in lower case, without a full stop.
        options: Dataclass of the options (options.py), of which the function takes an instance.
    """

    run: str
    help: str
    options: type


def add_commands(subparsers: argparse._SubParsersAction, commands: Mapping[str, Command]) -> None:
    """Add a parser for each command, by its name."""
    for name, command in commands.items():
        description = command.help[0].upper() + command.help[1:] + "."
        parser = subparsers.add_parser(name, help=command.help, description=description)
        parser.set_defaults(run=command.run, parser=parser, options=command.options)
        add_options(parser, command.options)


def run_chosen(args: argparse.Namespace) -> None:
    """Import and call the command that was chosen."""
    module, _, function = args.run.partition(":")
    getattr(import_module(module), function)(read_options(args.options, args))
