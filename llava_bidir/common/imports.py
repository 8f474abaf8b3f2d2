"""`--import FILE.py`, an option of every command: a file of one's own that registers masks, heads, layouts or families.

Lightning starts its processes with the same words. Processes that a command starts itself get :func:`import_words`.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from .errors import UsageError

OPTION = "--import"
HINT = f"{OPTION} FILE.py registers your own"
_files: list[str] = []  # of this process, as they were given


def take_imports(argv: Sequence[str]) -> list[str]:
    """Return the words of a command without `--import FILE.py`, after importing each file under its name.

    Raises:
        UsageError: There is no such file, or a module has its name already.
    """
    words, rest = [], iter(argv)
    for word in rest:
        option, equals, file = word.partition("=")
        if option != OPTION:
            words.append(word)
            continue
        _import(file if equals else next(rest, ""))
    return words


def import_words() -> list[str]:
    """Return the options that import what this process has imported, for commands that it starts."""
    return [word for file in _files for word in (OPTION, file)]


def imports_as_text() -> str:
    """Return the end of a command that is printed: " --import FILE.py", "" if nothing was imported."""
    return "".join(f" {quote(word)}" for word in import_words())


def _import(file: str) -> None:
    """Import a file; pickles and callbacks name its classes FILE.CLASS, so its folder comes last on the path."""
    path = Path(file).absolute()
    if path.suffix != ".py" or not path.stem.isidentifier() or not path.is_file():
        raise UsageError(f"{OPTION} {file}: expected a file NAME.py, where NAME is an identifier")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # the file may be new
    spec = importlib.util.find_spec(path.stem)
    if spec is None or spec.origin is None or not path.samefile(spec.origin):
        raise UsageError(f"{OPTION} {file}: there is a module {path.stem!r} already; rename it")
    importlib.import_module(path.stem)
    if file not in _files:
        _files.append(file)
