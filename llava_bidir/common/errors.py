"""Errors of the user's input as one line; a bug keeps its traceback."""

import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OURS = [Path(__file__).parents[2] / package for package in ("llava_bidir", "probes")]


def is_ours(file: str) -> bool:
    """Whether a source file is of this project's packages."""
    return any(Path(file).is_relative_to(package) for package in OURS)


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Ends the program with the message of an error that this project raised, and status 1.

    Raises:
        SystemExit: With that message.
    """
    try:
        yield
    except ValueError as error:
        message = own_message(error)
        if message is None:
            raise
        sys.exit(f"{program}: {message}")


def own_message(error: ValueError) -> str | None:
    """What it says if this project raised it: then it is about the user's input and says all; None for a bug.

    From a process that reads data, torch hands on an error with its traceback as text.
    """
    message, files = str(error), [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if re.match(r"Caught \w+ in DataLoader worker", message):
        files, message = re.findall(r'File "(.+?)", line', message), re.split(r"\n[\w.]+: ", message)[-1].strip()
    return message if is_ours(files[-1]) else None
