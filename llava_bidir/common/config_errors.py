"""Errors of jsonargparse in a sentence: the file, the key, what it takes, and what was probably meant."""

import inspect
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path

import yaml

from .configs import configs_in, read_values
from .errors import UserError
from .imports import HINT
from .usage_errors import did_you_mean

KEY = re.compile(r'Parser key "([^"]+)":? ?')
PROBLEM = re.compile(
    r"Problem with given class_path '([\w.]+)': (.*?)"
    r"(?= - (?:Problem with|Not a valid|Expected|Does not)| Given value type|$)"
)
EXPECTED = re.compile(r"Expected a (<class '[^']+'>|typing\.Literal\[[^]]*\])")
NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
GIVEN = re.compile(r"(?:Given value: |Got value: )(.*)$")
NOT_YAML = "Problems parsing config"
LONGEST = 200  # characters of a value that are shown


def explain_parser_error(message: str, words: Sequence[str], classes: Iterable[type] = ()) -> str:
    """Return the sentence for an error of jsonargparse, or the error itself if it is of another kind.

    Args:
        message: The error on one line.
        words: Of the command; its configs are read.
        classes: Classes that a key can name without their module, with all their subclasses.
    """
    if message.startswith(NOT_YAML):
        return _find_broken_file(words) or message
    found = KEY.search(message)
    if found is None:
        return message
    key = re.sub(r"^(fit|validate|test)\.", "", found.group(1))
    reason = _explain(message[found.end() :], classes)
    if reason is None:
        return message
    file = _find_file(key, words)
    return f"{file}: {key}: {reason}" if file else f"{key}: {reason}"


def explain_class(text: str) -> str | None:
    """Return why a class could not be built; None if an error on one line is not about that."""
    problem = PROBLEM.search(text)
    return _explain_problem(problem.group(1), problem.group(2).strip()) if problem else None


def _explain(text: str, classes: Iterable[type]) -> str | None:
    """Return what is wrong with a value, None if it is not said as jsonargparse does."""
    if of_class := explain_class(text):
        return of_class
    if no_class := NO_CLASS.search(text):
        name = no_class.group(1)
        known = {cls.__name__ for base in classes for cls in _subclasses(base)}
        return f"there is no class {name!r}{did_you_mean(name, known)}"
    given = GIVEN.search(text)
    types = [_name_type(found) for found in EXPECTED.findall(text)]
    if given is None or not types:
        return None
    value = given.group(1)
    shown = value if len(value) <= LONGEST else f"{value[:LONGEST]} ..."
    return f"expected {' or '.join(dict.fromkeys(types))}, got {shown}"


def _explain_problem(class_path: str, reason: str) -> str:
    """Return what is wrong with the class of a value, or with an option of it."""
    module, _, name = class_path.rpartition(".")
    if unknown := re.search(r"Option '([^']+)' is not accepted", reason):
        option = unknown.group(1).partition(".")[0]
        return f"{name} has no option {option!r}{did_you_mean(option, _options(module, name))}"
    if missing := re.search(r"No module named '[^']+'", reason):
        return f"{module} cannot be imported: {missing[0]}; {HINT}"
    if "has no attribute" in reason:
        return f"there is no class {name!r} in {module}{did_you_mean(name, _names(module))}"
    if inner := KEY.search(reason):
        wrong = _explain(reason[inner.end() :], ()) or reason[inner.end() :]
        return f"{name}.{inner.group(1)}: {wrong}"
    return f"{name}: {reason}"


def _name_type(text: str) -> str:
    """Return the name of a type: "int" of "<class 'int'>", and the values of a Literal."""
    if values := re.search(r"Literal\[(.*)\]", text):
        return values.group(1).replace("'", "")
    name = text.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return {"NoneType": "null"}.get(name, name)


def _subclasses(base: type) -> list[type]:
    below = [cls for child in base.__subclasses__() for cls in _subclasses(child)]
    return [base, *below]


def _names(module: str) -> list[str]:
    try:
        return dir(import_module(module))
    except (ImportError, ValueError):
        return []


def _options(module: str, name: str) -> list[str]:
    """Return the parameters of a class and of those that it extends."""
    cls = getattr(import_module(module), name)
    return [
        option
        for base in inspect.getmro(cls)
        for option in inspect.signature(base.__init__).parameters
    ]


def _find_file(key: str, words: Sequence[str]) -> str | None:
    """Return the last config that sets a key, None if an option does or nothing."""
    if any(re.match(rf"--{re.escape(key)}\b", word) for word in words):
        return None  # options come after configs
    for _, _, name in reversed([*configs_in(words)]):
        try:
            keys = [*read_values(name)]
        except (OSError, ValueError):
            continue
        levels = [f"{known}." for known in keys]
        if any(x.startswith(f"{key}.") or f"{key}.".startswith(x) for x in levels):
            return name
    return None


def _find_broken_file(words: Sequence[str]) -> str | None:
    """Return the first config that is not YAML, with the line and what is wrong there."""
    for _, _, name in configs_in(words):
        try:
            yaml.safe_load(Path(name).read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            context = f", {error.context}" if error.context else ""
            return f"{name}: not valid YAML{place}{context}: {error.problem}"
        except (OSError, ValueError, UserError):
            continue
    return None
