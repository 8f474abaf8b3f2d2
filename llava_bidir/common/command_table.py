"""A table of commands: their parsers, and the call of the one that was chosen."""

import argparse
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import NamedTuple


class Command(NamedTuple):
    """A command with options of its own.

    Args:
        run: "module:function", imported when the command runs, which takes the parsed arguments.
        help: A sentence in lower case, without a full stop.
        add_options: Adds the options to the command's parser.
    """

    run: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]


def add_commands(subparsers: argparse._SubParsersAction, commands: Mapping[str, Command]) -> None:
    """Add a parser for each command, by its name."""
    for name, command in commands.items():
        description = command.help[0].upper() + command.help[1:] + "."
        parser = subparsers.add_parser(name, help=command.help, description=description)
        parser.set_defaults(run=command.run, parser=parser)
        command.add_options(parser)


def run_chosen(args: argparse.Namespace) -> None:
    """Import and call the command that was chosen."""
    module, _, function = args.run.partition(":")
    getattr(import_module(module), function)(args)
