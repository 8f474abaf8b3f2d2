"""Errors in the user's input end a command with one line; bugs keep their traceback."""

import argparse
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from textwrap import shorten
from typing import Any, NoReturn

# An option in an error of argparse or jsonargparse
NAMED = re.compile(
    r"""(?:Group '([\w.]+)' does not accept option '|key "|arguments: --|ption ')([\w.]+)"""
)
# and of one that may be None, whose second reason nobody needs
OPTIONAL = re.compile(r"Does not validate .*? Errors: - (.*) - Expected a <class 'NoneType'>")
# of one that takes several types, whose names in Python say nothing to a user
UNION = re.compile(
    r"(?:Does not validate .*? Errors: )?(?:- )?(Expected .+? - .*Expected .+?)\.? "
    r"Given value type: .*?(Given value: .*)"
)
ACCEPTED = re.compile(
    r"Expected an? (?:<class '(?:\w+\.)*(\w+)'>|typing.Literal\[(.*?)\]|(path|dot import path))"
)


USER_FILES: list[str] = []  # that this process runs, by --import


class UserError(ValueError):
    """Invalid input; the message names the file, sample or option, what was expected, and what to do."""


class UsageError(UserError):
    """Words of a command that mean nothing; the status is 2."""


class NothingToMeasure(UserError):
    """An analysis has no case, e.g. because a model makes no mistakes; a study goes on without it."""


@contextmanager
def one_line_errors(program: str, argv: list[str] | tuple[str, ...] = ()) -> Iterator[None]:
    """End the program with one line on a `UserError` (status 1, or 2 of a `UsageError`) or Ctrl-C (130).

    So does any exception in a file of the user's, with its last line there. Others pass through.

    Raises:
        SystemExit: With that message.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        advice = str(stop) or "run the same command again to go on"
        print(f"{program}: interrupted; {advice}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `probes sites MODEL | head`
        # else the interpreter complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UsageError as error:
        print(f"{' '.join([program, *argv[:1]])}: {error} (see --help)", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        # torch prepends the traceback of a worker
        message = re.sub(
            r"(?s)Caught \w+ in DataLoader worker.*\n(Original )?[\w.]+: ", "", str(error)
        )
        sys.exit(f"{program}: {message.strip()}")
    except Exception as error:
        if message := describe_in_user_file(error):
            sys.exit(f"{program}: {message}")
        raise


def describe_in_user_file(error: Exception) -> str:
    """Return what an exception says, with the last line of a user's file that it passed; "" if it passed none."""
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_filename in USER_FILES:
            place = f"{code.co_filename}:{line}, in {code.co_name}"
    text = shorten(str(error), 500, placeholder=" ...")
    return place and f"{place}: {type(error).__name__}: {text}"


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return the end of an error about an unknown name, with the one that is most like it; "" without one."""
    for name in get_close_matches(word, [*names], 1):
        return f"; did you mean {name!r}?"
    return ""


class OneLineErrors:
    """Parser whose errors are one line, with the option that was probably meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UsageError`."""
        if not self.exit_on_error:  # jsonargparse's parser of a class; its caller adds the key
            raise argparse.ArgumentError(None, message) from ex
        line = " ".join(message.split()).removeprefix('Parser key "config": ')
        if "are required" in line:  # LightningCLI puts its command before the name
            line = re.sub(r" (fit|validate|test)\.", " ", line)
        line = OPTIONAL.sub(r"\1.", line)
        if union := UNION.search(line):
            accepted = [ACCEPTED.match(reason) for reason in union[1].split(" - ")]
            if all(accepted):  # else one of the reasons says more
                names = ", ".join(kind[kind.lastindex] for kind in accepted)
                line = f"{line[: union.start()]}expected one of {names}. {union[2]}"
        line = line.replace(
            "in set_parsing_settings to", "in a file of --import, whose classes are allowed, to"
        )
        if option := NAMED.search(line):
            name = ".".join(filter(None, option.groups()))
            parsers = [self]
            if self._subcommands_action is not None:  # LightningCLI's
                parsers += self._subcommands_action.choices.values()
            names = []
            for parser in parsers:
                names += [text.strip("-") for text in parser._option_string_actions]
            if name not in names:
                last_parts = [full_name.rpartition(".")[2] for full_name in names]
                line += did_you_mean(name, [*names, *last_parts])
        raise UsageError(line) from None


@contextmanager
def error_context(subject: Any) -> Iterator[None]:
    """Convert any exception into a `UserError` about `subject`; untrusted files make libraries raise all kinds."""
    try:
        yield
    except Exception as error:
        text = shorten(str(error), 500, placeholder=" ...")
        if type(error) not in (ValueError, UserError):
            text = f"{type(error).__name__}: {text}"
        raise UserError(f"{subject}: {text}") from error
