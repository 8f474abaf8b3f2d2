"""Errors of the command line in at most three lines, with the option that was probably meant."""

import argparse
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import NoReturn

from .imports import OPTION as IMPORT

SHORT_HELP: set[str] = set()  # commands of this process whose `--help` is short (short_help.py)


class ShortUsageErrors:
    """Parser that ends with status 2, the error, the nearest option or command, and where the options are listed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the error instead of the usage, which for `fit` has more than 60 lines.

        Raises:
            ArgumentError: This is jsonargparse's parser of a class; its caller adds the key of the class.
        """
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message) from ex
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        command = f"{program} {next(iter(getattr(self, 'words', ())), '')}"
        program = command if command in SHORT_HELP else program
        message = re.sub(r"\bfit\.|\bvalidate\.|\btest\.", "--", " ".join(message.split()))
        lines = [f"{program}: {message}"]
        if meant := _nearest(parser, message):
            lines.append(f"did you mean {meant}?")
        option = "--help-all" if program in SHORT_HELP else "--help"
        self.exit(2, "\n".join([*lines, f"All options: {program} {option}"]) + "\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []) or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(ShortUsageErrors, argparse.ArgumentParser):
    """argparse's parser with short errors and defaults in the help; its subcommands have them, too."""

    def __init__(self, *args, formatter_class: type = HelpFormatter, **kwargs):
        super().__init__(*args, formatter_class=formatter_class, **kwargs)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Return the options; an unknown one is an error of the command that it was given to."""
        namespace, unknown = self.parse_known_args(args, namespace)
        command = getattr(namespace, "parser", self)
        if unknown and not any(word.startswith("-") for word in unknown):
            unknown = command.add_to_list(namespace, unknown)
        if unknown:
            command.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace

    def add_to_list(self, namespace: argparse.Namespace, words: list[str]) -> list[str]:
        """Add words after an option to the list that the command takes, if it does, and return those that are left.

        argparse itself ends a list at the first option: of `segment RUN --site encoder PHOTO` it leaves the photo.
        """
        lists = [action for action in self._get_positional_actions() if action.nargs in ("+", "*")]
        if not lists:
            return words
        (action,) = lists
        more = [self._get_value(action, word) for word in words]
        setattr(namespace, action.dest, getattr(namespace, action.dest) + more)
        return []


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name, with the known one that is most like it; "" without one."""
    meant = get_close_matches(word, [*known], 1)
    return f"; did you mean {meant[0].removeprefix('--')!r}?" if meant else ""


def _nearest(parser: argparse.ArgumentParser, message: str) -> str | None:
    """Return the option or command most like the first unknown one in an error, or None."""
    known = {IMPORT, *_names(parser)}
    unknown = re.findall(r"(?<![\w.-])--?[\w.-]+|(?<=invalid choice: ')[\w-]+", message)
    for word in unknown:
        word = word.partition("=")[0]
        alike = [name for name in known if name.startswith("-") == word.startswith("-")]
        if word not in known and (meant := get_close_matches(word, alike, 1)):
            return meant[0]
    return None


def _names(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield all options of a parser and its commands."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action.choices, dict):  # of names to parsers
            for name, command in action.choices.items():
                yield name
                yield from getattr(command, "_option_string_actions", ())
