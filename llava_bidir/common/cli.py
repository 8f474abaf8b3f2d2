"""The command line of both packages: a table of commands, whose options are the fields of frozen dataclasses.

    draws: Count = 5                       --draws 5
    by_class: bool = False                 --by_class, or --by_class false
    layers: tuple[int, ...] | None = None  --layers 1 2 3, 1,2,3 or [1,2,3]
    solver: SolverOptions                  --solver.folds 4, or --folds 4 where no other option ends so
    photos: tuple[str, ...] = positional() PHOTO ..., words without a name

jsonargparse checks the types, of words, of YAML (`-c`) and of values in Python. Nothing here imports torch.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from pkgutil import resolve_name
from textwrap import fill
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import jsonargparse
from jsonargparse.typing import register_type, restricted_number_type

from . import imports
from .configs import configs_first, merge_configs, take_configs
from .errors import OneLineErrors, UsageError, did_you_mean, one_line_errors


def number(name: str, kind: type, limits: str) -> type:
    """Return a type of options: numbers within limits, such as ">= 1 < inf".

    They stay plain int and float: checkpoints load without code, and so without classes of ours.
    """
    words = limits.split()
    pairs = zip(words[::2], map(kind, words[1::2]), strict=True)
    restricted = restricted_number_type(name, kind, [*pairs])
    register_type(
        restricted,
        serializer=kind,
        deserializer=lambda value: kind(restricted(value)),
        type_check=lambda *_: False,
    )
    return restricted


Count = number("Count", int, ">= 1 < 2147483648")
Index = number("Index", int, ">= 0 < 2147483648")
Seed = number("Seed", int, ">= 0 < 4294967296")  # numpy's range
Positive = number("Positive", float, "> 0 < inf")
NonNegative = number("NonNegative", float, ">= 0 < inf")
Share = number("ClosedUnitInterval", float, ">= 0 <= 1")  # as jsonargparse calls it
ShareBelow1 = number("ShareBelow1", float, ">= 0 < 1")
ShareAbove0 = number("ShareAbove0", float, "> 0 <= 1")
Indices = tuple[Index, ...]
Values = dict[str, bool | int | float | str | list | dict | None]  # what something else checks


class Command(NamedTuple):
    """A function, "module:name", of options of a dataclass; without `options`, of the words of a LightningCLI."""

    run: str
    help: str
    options: type | None = None


ALONE = ("-h", "--help", "--print_config")  # options without a value
BOOLEANS = ("true", "false", "yes", "no")  # in any case
# A list as one word: [a,b], or a,b where nothing looks like OPTION=VALUE, a path or a text with commas
LIST = re.compile(r"\[.*|[^=,/{]+(,[^\s=,/{][^=,/{]*)+")

Groups = Mapping[str, Mapping[str, Command]]  # of commands by name, by what one wants to do


def positional(least: int = 1, **default: Any) -> Any:
    """Return a field whose value is a word without a name, or several, of which `least` are needed."""
    return field(metadata={"least": least}, **default)


def derived(**default: Any) -> Any:
    """Return a field that is no option: its value follows from others."""
    return field(metadata={"derived": True}, **default)


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """Parser of a dataclass of options; the help of a field is its entry under "Args:" there.

    The dataclass can also say `first_words`, options of its parts that take words without a name, and
    `in_configs_only`, options of its parts that configs may have without an effect.
    """

    def __init__(self, options: type, program: str = "", text: str = ""):
        """Add an option for each field; `program` and `text` are for the help."""
        self.options = options
        self.places = dict.fromkeys(getattr(options, "first_words", ()), 1)
        for option in fields(options):
            if "least" in option.metadata:
                self.places[option.name] = option.metadata["least"]
        usage = " ".join([program, *map(str.upper, self.places), "[options]"])
        super().__init__(prog=program, usage=usage, description=text)
        about = "config by name or path; several merge, and options replace their values"
        self.add_argument("-c", "--config", action="config", metavar="NAME", help=about)
        derived_names = {option.name for option in fields(options) if "derived" in option.metadata}
        self.add_class_arguments(options, sub_configs=False, skip=derived_names)
        self.allow_abbrev = False
        for action in self._actions:  # of a dataclass that is the default of a field
            action.required = action.required and action.default is None

    def read(self, words: Sequence[str], values: Mapping[str, Any] | None = None) -> Any:
        """Return the options. Values, nested as in YAML, replace those of configs, and words replace both.

        Raises:
            UsageError: One is unknown, missing or of another type, or a config cannot be read.
        """
        configs, words = take_configs(words)
        merged = merge_configs(configs, values or {})
        parts = {option.name for option in fields(self.options) if is_dataclass(option.type)}
        for name, value in merged.items():
            if name in parts and not isinstance(value, dict):
                self.error(f'Parser key "{name}": Expected options. Got value: {value}')
        places = {name: 0 if name in merged else least for name, least in self.places.items()}
        joined = join_values(self, words, places)
        for name in getattr(self.options, "in_configs_only", ()):
            if any(word.startswith(f"--{name}=") for word in joined):
                self.error(f"--{name} does nothing here; leave it out")
        config = f"--config={json.dumps(merged, default=str)}"
        made = vars(self.instantiate(self.parse_args([config, *joined])))
        del made["config"]
        return self.options(**made)


def join_values(
    parser: jsonargparse.ArgumentParser, words: Sequence[str], places: Mapping[str, int] = {}
) -> list[str]:
    """Return words as jsonargparse takes them: options by their full names, values after a "=", lists as JSON.

    Args:
        parser: Has the options.
        words: As they are typed.
        places: Options that take words without a name, in this order, and the fewest words that each needs.
    """
    typed: list[TypedOption] = []
    unnamed = []
    for word in words:
        if word.startswith("--") or word in parser._option_string_actions:
            typed.append(find_option(parser, word))
        elif typed and typed[-1].takes(word):
            typed[-1].values.append(word)
        elif re.match(r"-\S+$", word):
            parser.error(f"unrecognized arguments: {word}; options begin with --")
        else:
            unnamed.append(word)
    named = {option.name for option in typed}
    places = {name: least for name, least in places.items() if f"--{name}" not in named}
    missing = sum(places.values()) - len(unnamed)
    lists = [option.values for option in typed if len(option.values) > max(1, missing)]
    if missing > 0 and len(lists) == 1:  # they stand after a list, which has taken them
        unnamed += lists[0][-missing:]
        del lists[0][-missing:]
    joined = [option.joined() for option in typed]
    for name in places:
        if unnamed and list in find_option(parser, f"--{name}").kinds:
            joined.append(f"--{name}={json.dumps(unnamed)}")
            unnamed = []
        elif unnamed:
            joined.append(f"--{name}={unnamed.pop(0)}")
    for word in joined:
        option = find_option(parser, word)
        if option.values == [""] and str not in option.kinds:  # as a path, the current folder
            parser.error(f"{option.name} is empty")
    return [*joined, *unnamed]


@dataclass
class TypedOption:
    """An option as it is typed.

    Args:
        name: Its full name.
        kinds: What it accepts, see :func:`kinds_of`.
        values: Words that belong to it.
        is_complete: Whether it takes no word after it, as NAME=VALUE and --help.
    """

    name: str
    kinds: list[Any]
    values: list[str]
    is_complete: bool

    def takes(self, word: str) -> bool:
        """Return whether a word after it is a value of it; a list ends at the next option, or after a word a,b."""
        if self.is_complete:
            return False
        if self.values:
            return list in self.kinds and not LIST.fullmatch(self.values[0])
        return self.kinds != [bool] or word.lower() in BOOLEANS

    def joined(self) -> str:
        """Return the option and its values as one word."""
        if not self.values:
            if self.kinds == [bool]:
                return f"{self.name}=true"
            return self.name
        value = self.values[0]
        if list not in self.kinds or value.startswith("["):
            return f"{self.name}={value}"
        if LIST.fullmatch(value):
            return f"{self.name}={json.dumps(value.split(','))}"
        is_type = any(kind is not list and isinstance(kind, type) for kind in self.kinds)
        if len(self.values) == 1 and (value in self.kinds or is_type):
            return f"{self.name}={value}"
        return f"{self.name}={json.dumps(self.values)}"


def find_option(parser: jsonargparse.ArgumentParser, word: str) -> TypedOption:
    """Return the option of a word, by its name or by the last part of that where no other name ends so."""
    option, equals, value = word.partition("=")
    values = []
    if equals:
        values = [value]
    actions = parser._option_string_actions
    name = option
    if option not in actions:
        last_part = option[2:].replace("-", "_")
        ends = [full for full in actions if full.endswith(f".{last_part}")]
        name = f"--{last_part}"
        if name not in actions and len(ends) == 1:
            (name,) = ends
    return TypedOption(
        name,
        kinds=kinds_of(getattr(actions.get(name), "_typehint", None)),
        values=values,
        is_complete=bool(equals) or name in ALONE,
    )


def kinds_of(hint: Any) -> list[Any]:
    """Return what a type of options accepts: types, `list` for lists and tuples, and constants as they are typed."""
    if hint is NoneType:
        return ["null"]
    if get_origin(hint) in (list, tuple):
        return [list]
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    if get_origin(hint) in (Union, UnionType):
        return [*chain.from_iterable(map(kinds_of, get_args(hint)))]
    return [hint]


def run(program: str, about: str, groups: Callable[[], Groups], argv: Sequence[str] | None) -> None:
    """Run one command; `groups` are asked for after `--import FILE.py` has registered what it brings.

    Raises:
        SystemExit: Of status 0 with help, 1 with an error, 2 with one of usage, or 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors(program, argv):
        name, *words = imports.take_imports(argv) or [""]
        commands: dict[str, Command] = {}
        for group in groups().values():
            commands |= group
        if name in ("", "-h", "--help"):
            print(_format_help(program, about, groups()), file=sys.stdout if name else sys.stderr)
            sys.exit(0 if name else 2)
        if "--version" in (name, *words[:1]):
            print(program, resolve_name("llava_bidir:__version__"))
            return
        if name not in commands:
            raise UsageError(f"there is no command {name!r}{did_you_mean(name, commands)}")
        if commands[name].options is None:
            given = [name, *configs_first(words)]
        else:
            parser = Parser(commands[name].options, f"{program} {name}", commands[name].help)
            given = parser.read(words)
        resolve_name(commands[name].run)(given)


def _format_help(program: str, about: str, groups: Groups) -> str:
    lines = [f"usage: {program} COMMAND [options]", "", about]
    for title, commands in groups.items():
        lines += ["", f"{title}:"]
        for name, command in commands.items():
            lines.append(fill(f"  {name:<16}{command.help}", 100, subsequent_indent=" " * 18))
    more = f"{program} COMMAND --help has the options. All take {imports.OPTION} FILE.py, a file that registers"
    lines += ["", f"{more} masks, heads, layouts, tasks, analyses or families."]
    lines.append(
        "Lists are typed a b, a,b or [a,b]; flags --name or --name false; the last part of a name is enough."
    )
    return "\n".join(lines)
