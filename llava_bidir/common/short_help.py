"""Help of the commands that take hundreds of options: printed at once, without importing what defines them.

`COMMAND --help` shows what the command does, an example, and the options that people use; `--help-all` shows all.
A test compares the options and their defaults with the parser's.
"""

import sys
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

from . import usage_errors

WIDTH = 100  # characters of a line
HELP = ("-h", "--help")
HELP_ALL = "--help-all"


class ShortHelp(NamedTuple):
    """What `COMMAND --help` prints.

    Args:
        text: What the command does.
        example: A command that works.
        options: What the options mean, by name; a default is given as "(default: VALUE)".
    """

    text: str
    example: str
    options: Mapping[str, str]


def show_short_help(program: str, argv: list[str], pages: Mapping[str, ShortHelp]) -> list[str]:
    """Return the words of a command; `--help-all` becomes `--help`, which the command's own parser answers.

    Raises:
        SystemExit: The short help was asked for, and is printed.
    """
    page = pages.get(argv[0])
    if page and any(word in HELP for word in argv[1:]):
        print(format_help(f"{program} {argv[0]}", page))
        sys.exit(0)
    if not page:
        return argv
    usage_errors.SHORT_HELP.add(f"{program} {argv[0]}")
    return ["--help" if word == HELP_ALL else word for word in argv]


def format_help(program: str, page: ShortHelp) -> str:
    """Return the text of a page."""

    def wrap(text, indent):
        return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=" " * 30)

    options = dict(page.options) | {HELP_ALL: "show every option"}
    rows = [wrap(text, f"  {name:<27} ") for name, text in options.items()]
    text = "\n".join(textwrap.wrap(page.text, WIDTH))
    return "\n".join(
        [f"usage: {program} [options]\n", text, f"\nexample: {page.example}\n", "options:", *rows]
    )
