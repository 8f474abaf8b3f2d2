"""`--import FILE.py`, an option of every command: a file of one's own that registers a mask, a head, a task ...

Lightning starts its processes with the same words. Processes that a command starts itself get :func:`import_words`.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from jsonargparse import set_parsing_settings

from .errors import USER_FILES, UsageError, UserError

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


def is_ours(function: Callable) -> bool:
    """Return whether a function is of these packages, not of a user's."""
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("llava_bidir", "probes")


def name_of(function: Callable | str) -> str:
    """Return the name of a function for messages, with the file of a user's; a name as it is."""
    if isinstance(function, str):
        return function
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{name} of {function.__module__}.py"


def check_takes(function: Callable, *names: str) -> None:
    """Raise a UserError unless a function of a user's can be called with arguments of these names."""
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        expected = ", ".join(names)
        raise UserError(f"{name_of(function)}: {error}; it is called with ({expected})") from None


def check_returned(function: Callable, value: Any, kind: type) -> Any:
    """Return what a function of a user's returned; raise a UserError if it is of another kind."""
    if not isinstance(value, kind):
        raise UserError(
            f"{name_of(function)} returned a {type(value).__name__}; expected a {kind.__name__}"
        )
    return value


def check_shape(function: Callable | str, value: Any, shape: Sequence[int]) -> Any:
    """Return the tensor that a function of a user's returned; raise a UserError if it has another shape."""
    returned = tuple(getattr(value, "shape", ()))
    if returned != tuple(shape):
        kind = f"{type(value).__name__} of shape {list(returned)}"
        raise UserError(f"{name_of(function)} returned a {kind}; expected shape {list(shape)}")
    return value


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
    USER_FILES.append(spec.origin)
    with code_of(file):
        importlib.import_module(path.stem)
    set_parsing_settings(import_path_allowlist=[path.stem])  # configs may name its classes
    if file not in _files:
        _files.append(file)
