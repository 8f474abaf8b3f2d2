"""Errors in the user's input end a command with one line; bugs keep their traceback."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 500  # characters of a library's error that are shown


class UserError(ValueError):
    """Invalid input; the message names the file, sample or option, what was expected, and what to do."""


class NothingToMeasure(UserError):
    """An analysis has no case, e.g. because a model makes no mistakes; a study goes on without it."""


@contextmanager
def one_line_errors(program: str, argv: list[str] | tuple[str, ...] = ()) -> Iterator[None]:
    """End the program with one line on a `UserError` (status 1) or Ctrl-C (130); other exceptions pass through.

    Raises:
        SystemExit: With that message.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning's exit(1)
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        advice = str(stop)  # of a run (interrupt.py)
        if isinstance(stop, SystemExit) or not advice:
            advice = "run the same command again"
            if argv[:1] not in (["fit"], ["solve"]):
                advice += " to go on"
        print(f"{program}: interrupted; {advice}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `probes sites MODEL | head`
        # else the interpreter complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        # torch prepends the traceback of a worker
        message = re.sub(r"(?s)Caught \w+ in DataLoader worker.*\n[\w.]+: ", "", str(error))
        sys.exit(f"{program}: {message.strip()}")


@contextmanager
def error_context(subject: Any) -> Iterator[None]:
    """Convert any exception into a `UserError` about `subject`; untrusted files make libraries raise all kinds."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        if "trust_remote_code" in str(error):
            lines = ["it requires code from the checkpoint, which is never executed"]
        kind = "" if type(error) in (ValueError, UserError) else f"{type(error).__name__}: "
        text = " ".join(lines[:3])
        if len(text) > LONGEST:
            text = text[:LONGEST].rpartition(" ")[0] + " ..."
        raise UserError(f"{subject}: {kind}{text}") from error
