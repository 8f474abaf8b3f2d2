"""Options as the fields of a frozen dataclass: name, type, default, limits and help of an option are written once.

The help of a field is the entry of its name under "Args:" in the docstring of its class.

    draws: Count = 5                       --draws 5
    by_class: bool = False                 --by-class, or --by-class false
    layers: tuple[int, ...] | None = None  --layers 1 2 3
    control: Literal["a", "b"] = "a"       --control b
    probes: Path                           --probes RUN, which must be given
    model: Path = positional()             MODEL, a word without a name
    runs: tuple[Path, ...] = positional()  RUNS ..., words without a name
    fit: bool = flag()                     --fit, which takes no value

The command line and a dict of values make the same dataclass, by the same checks (:func:`options_from`). Nothing here
imports torch.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import pydantic
import yaml

from .errors import UserError, error_context

Options = TypeVar("Options")

Count = Annotated[int, pydantic.Field(ge=1)]
Seed = Annotated[int, pydantic.Field(ge=0)]
Indices = Annotated[tuple[Seed, ...], pydantic.Field(min_length=1)]
METAVARS = {int: "N", float: "X", Path: "PATH"}


def positional(**default: Any) -> Any:
    """Return a field whose value is a word without a name, or several; it must be given unless it has a default."""
    return field(metadata={"positional": True}, **default)


def flag() -> Any:
    """Return a field that is true if its option is given, which takes no value."""
    return field(default=False, metadata={"flag": True})


# --------------------------------------------------------------------------------------------------- command line
def add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """Add an option for each field of a dataclass."""
    kinds = get_type_hints(options)
    texts = help_texts(options)
    for entry in fields(options):
        keywords = _keywords(kinds[entry.name]) | {"help": texts[entry.name]}
        if "positional" in entry.metadata:
            parser.add_argument(entry.name, **_keywords_of_word(entry, keywords))
            continue
        if "flag" in entry.metadata:
            keywords = {"action": "store_true", "help": texts[entry.name]}
        name = entry.name.replace("_", "-")
        parser.add_argument(f"--{name}", **keywords | _default(entry))


def help_texts(options: type) -> dict[str, str]:
    """Return the help of each field, from the docstrings of the dataclass and of those that it extends."""
    texts = {}
    for part in reversed(options.__mro__):
        arguments = cleandoc(vars(part).get("__doc__") or "").partition("\nArgs:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", arguments, re.MULTILINE):
            texts[name] = " ".join(text.split()).removesuffix(".")
    return texts


def _keywords(kind: Any) -> dict[str, Any]:
    """Return the keywords of `add_argument` for a type."""
    kind = _without_none(kind)
    if kind in METAVARS:
        return {"metavar": METAVARS[kind]}
    if kind is bool:
        return {"nargs": "?", "const": "true", "choices": ("true", "false")}
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return {"choices": choices, "type": type(choices[0])}
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        return _keywords(first) | {"nargs": "*" if Ellipsis in others else 1 + len(others)}
    return {}


def _keywords_of_word(entry: Field, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of `add_argument` for words without a name."""
    several = {"nargs": "+" if entry.default is MISSING else "*"} if "nargs" in keywords else {}
    if not several and entry.default is not MISSING:
        several = {"nargs": "?", "default": entry.default}
    return {**keywords, "metavar": entry.name.upper(), **several}


def _without_none(kind: Any) -> Any:
    """Return the `int` of `int | None`."""
    return get_args(kind)[0] if NoneType in get_args(kind) else kind


def _default(entry: Field) -> dict[str, Any]:
    if entry.default is MISSING:
        return {"required": True}
    if "flag" in entry.metadata:
        return {}
    if isinstance(entry.default, bool):
        return {"default": str(entry.default).lower()}
    if isinstance(entry.default, tuple):
        return {"default": list(entry.default)}
    return {"default": entry.default}


def read_options(options: type[Options], args: argparse.Namespace) -> Options:
    """Return the options that were given on the command line.

    Raises:
        UserError: One has another type, or is out of range.
    """
    values = {entry.name: getattr(args, entry.name) for entry in fields(options)}
    return options_from(options, values, "")


# --------------------------------------------------------------------------------------------------------- values
def options_from(options: type[Options], values: Mapping[str, Any], owner: str) -> Options:
    """Return the options with these values; all others have their defaults.

    Args:
        options: The dataclass.
        values: By name of the field. Lists are tuples, texts are paths, and numbers may be texts.
        owner: Whose options they are, for errors; "" if the user knows.

    Raises:
        UserError: There is no such option, it has another type or is out of range, or one that must be given is not.
    """
    for name in values:
        _field(options, name, owner)
    try:
        return pydantic.TypeAdapter(options).validate_python(dict(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
    name = first["loc"][0]
    option = name.replace("_", "-")
    start = f"{owner}: {name}" if owner else f"--{option}"
    if first["type"] == "missing":
        raise UserError(f"{start} is missing; it must be given")
    expected = first["msg"].replace("Input should be", "expected")
    raise UserError(f"{start} is {first['input']!r}; {expected}")


def value_from_text(
    options: type,
    name: str,
    text: str,
    owner: str,
) -> Any:
    """Return what a text means as the value of an option: of a list, its parts between commas.

    Args:
        options: The dataclass.
        name: Name of a field, with "_" or "-".
        text: "sky,road", or a list as YAML has it, in which names may contain commas: '["a, b", "c"]'.
        owner: Whose options they are, for errors.

    Raises:
        UserError: There is no such option, or the list is no YAML.
    """
    entry = _field(options, name.replace("-", "_"), owner)
    if get_origin(_without_none(get_type_hints(options)[entry.name])) is not tuple:
        return text
    if text.startswith("["):
        with error_context(f"{owner}: {name}={text}"):
            return [str(part) for part in yaml.safe_load(text)]
    return text.split(",")


def _field(options: type, name: str, owner: str) -> Field:
    known = {entry.name: entry for entry in fields(options)}
    if name not in known:
        meant = get_close_matches(name, known, 1)
        expected = f"did you mean {meant[0]!r}?" if meant else f"expected one of {', '.join(known)}"
        raise UserError(f"{owner} has no option {name!r}; {expected}")
    return known[name]
