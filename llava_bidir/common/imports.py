"""`--import FILE.py`, an option of every command: a file of one's own that registers masks, heads, layouts or families.

Lightning starts its processes with the same words. Processes that a command starts itself get :func:`import_words`.
"""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from jsonargparse import set_parsing_settings

from .errors import UsageError, UserError

OPTION = "--import"
HINT = f"{OPTION} FILE.py registers your own"
_files: list[str] = []  # of this process, as they were given


def take_option(words: Sequence[str], *names: str) -> tuple[list[str], list[str]]:
    """Return the values of an option among the words of a command, and the other words."""
    values = []
    others = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in names:
            values.append(value if equals else next(rest, ""))
        else:
            others.append(word)
    return values, others


def take_imports(argv: Sequence[str]) -> list[str]:
    """Return the words of a command without `--import FILE.py`, after importing each file under its name.

    Raises:
        UsageError: There is no such file, or a module has its name already.
        UserError: The file is no Python, or ends the program.
    """
    files, words = take_option(argv, OPTION)
    for file in files:
        _import(file)
    return words


@contextmanager
def code_of(file: str | Path) -> Iterator[None]:
    """Raise a UserError if code of a user's is no Python, registers what is refused, or ends the program."""
    try:
        yield
    except SyntaxError as error:
        raise UserError(f"{file}: {error}") from None  # with its line
    except ValueError as error:  # what it registers is refused
        *_, last = walk_tb(error.__traceback__)
        if not str(last[0].f_globals.get("__name__")).startswith(("llava_bidir.", "probes.")):
            raise
        raise UserError(f"{file}: {error}") from error
    except SystemExit:
        raise UserError(f"{file} ends the program; leave sys.exit out of it") from None


def import_words() -> list[str]:
    """Return the options that import what this process has imported, for commands that it starts."""
    return [word for file in _files for word in (OPTION, file)]


def _import(file: str) -> None:
    """Import a file; pickles and callbacks name its classes FILE.CLASS, so its folder comes last on the path."""
    path = Path(file).absolute()
    if not path.is_file():
        raise UsageError(f"{OPTION} {file}: no such file")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise UsageError(f"{OPTION} {file}: expected a file NAME.py, where NAME is an identifier")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # the file may be new
    spec = importlib.util.find_spec(path.stem)
    if spec is None or spec.origin is None or not path.samefile(spec.origin):
        raise UsageError(f"{OPTION} {file}: there is a module {path.stem!r} already; rename it")
    with code_of(file):
        importlib.import_module(path.stem)
    set_parsing_settings(import_path_allowlist=[path.stem])  # configs may name its classes
    if file not in _files:
        _files.append(file)
