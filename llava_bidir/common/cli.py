"""The command line of both packages: a table of commands, whose options are the fields of frozen dataclasses.

    draws: Count = 5                       --draws 5
    by_class: bool = False                 --by_class, or --by_class false
    layers: tuple[int, ...] | None = None  --layers 1 2 3
    solver: SolverOptions                  --solver.folds 4, or --folds 4 where no other option ends so
    photos: tuple[str, ...] = positional() PHOTO ..., words without a name

jsonargparse checks the types, of words, of YAML (`-c`) and of values in Python. Nothing here imports torch.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, fields
from pkgutil import resolve_name
from textwrap import fill
from typing import Any, NamedTuple

import jsonargparse
from jsonargparse.typing import register_type, restricted_number_type

from . import imports
from .configs import configs_first, merge_configs, take_configs
from .errors import OneLineErrors, UsageError, did_you_mean, one_line_errors


def number(name: str, kind: type, limits: str) -> type:
    """Return a type of options: numbers within limits, such as ">= 1 < inf".

    They stay plain int and float: checkpoints load without code, and so without classes of ours.
    """
    operators, values = limits.split()[::2], map(kind, limits.split()[1::2])
    restricted = restricted_number_type(name, kind, [*zip(operators, values, strict=True)])
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
Indices = tuple[Index, ...]
Values = dict[str, bool | int | float | str | list | dict | None]  # what something else checks


class Command(NamedTuple):
    """A function, "module:name", of options of a dataclass; without `options`, of the words of a LightningCLI."""

    run: str
    help: str
    options: type | None = None


Groups = Mapping[str, Mapping[str, Command]]  # of commands by name, by what one wants to do


def positional(**default: Any) -> Any:
    """Return a field whose value is a word without a name, or several."""
    return field(metadata={"positional": True}, **default)


def derived(**default: Any) -> Any:
    """Return a field that is no option: its value follows from others."""
    return field(metadata={"derived": True}, **default)


class Parser(OneLineErrors, jsonargparse.ArgumentParser):
    """Parser of a dataclass of options; the help of a field is its entry under "Args:" there."""

    def __init__(self, options: type, program: str = "", text: str = ""):
        """Add an option for each field; `program` and `text` are for the help."""
        self.options = options
        self.words = [entry.name for entry in fields(options) if "positional" in entry.metadata]
        usage = " ".join([program, *map(str.upper, self.words), "[options]"])
        super().__init__(prog=program, usage=usage, description=text, print_config=None)
        about = "config by name or path; several merge, and options replace their values"
        self.add_argument("-c", "--config", action="config", metavar="NAME", help=about)
        followed = {entry.name for entry in fields(options) if "derived" in entry.metadata}
        self.add_class_arguments(options, sub_configs=False, skip=followed)
        self.kinds = {x.dest: str(getattr(x, "_typehint", "")) for x in self._actions}
        for action in self._actions:  # of a dataclass that is the default of a field
            action.required = action.required and action.default is None

    def read(self, words: Sequence[str], values: Mapping[str, Any] | None = None) -> Any:
        """Return the options. Values, nested as in YAML, replace those of configs, and words replace both.

        Raises:
            UsageError: One is unknown, missing or of another type, or a config cannot be read.
        """
        configs, words = take_configs(words)
        merged = merge_configs(configs, values or {})
        for name, value in merged.items():
            if any(x.startswith(f"{name}.") for x in self.kinds) and not isinstance(value, dict):
                self.error(f'Parser key "{name}": Expected options. Got value: {value}')
        given = [f"--config={json.dumps(merged, default=str)}", *self._with_values(words)]
        made = self.instantiate(self.parse_args(given))
        names = [entry.name for entry in fields(self.options) if entry.name in made]
        return self.options(**{name: made[name] for name in names})

    def _with_values(self, words: Sequence[str]) -> Iterator[str]:
        """Yield options with their values after a "=", lists as JSON; words without a name are those of fields."""
        parts = [[""]]  # an option with the words up to the next one
        for text in words:
            parts.append([text]) if text.startswith("-") else parts[-1].append(text)
        loose = []
        given = set()
        for option, *after in parts:
            name, equals, text = option.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            ends = [known for known in self.kinds if known.endswith(f".{name}")]
            name = ends[0] if len(ends) == 1 and name not in self.kinds else name
            if name in getattr(self.options, "in_configs_only", ()):
                self.error(f"--{name} does nothing here; leave it out")
            given.add(name)
            kind = self.kinds.get(name, "")
            if "bool'" in kind and not equals and after[:1] not in (["true"], ["false"]):
                after.insert(0, "true")
            taken = len(after) if "tuple[" in kind else 1
            if equals or not option.startswith("--"):
                taken = 0
            loose += after[taken:]
            if after[:taken]:
                yield f"--{name}={_as_text(kind, after[:taken])}"
            elif option:
                yield f"--{name}{equals}{text}" if option.startswith("--") else option
        for name in self.words:
            taken = len(loose) if "tuple[" in self.kinds[name] else 1
            if loose and name not in given:
                yield f"--{name}={_as_text(self.kinds[name], loose[:taken])}"
                loose = loose[taken:]
        yield from loose


def _as_text(kind: str, words: list[str]) -> str:
    """Return the words of an option as one; those of a list as JSON, unless they are a list already."""
    is_list = "tuple[" in kind and not (len(words) == 1 and words[0].startswith("["))
    return json.dumps(words) if is_list else words[0]


def run(program: str, about: str, groups: Callable[[], Groups], argv: Sequence[str] | None) -> None:
    """Run one command; `groups` are asked for after `--import FILE.py` has registered what it brings.

    Raises:
        SystemExit: Of status 0 with help, 1 with an error, 2 with one of usage, or 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors(program, argv):
        name, *words = imports.take_imports(argv) or [""]
        commands = {key: entry for group in groups().values() for key, entry in group.items()}
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
            lines.append(fill(f"  {name:<14}{command.help}", 100, subsequent_indent=" " * 16))
    more = f"{program} COMMAND --help has the options. All take {imports.OPTION} FILE.py, a file that registers"
    return "\n".join([*lines, "", f"{more} masks, heads, layouts or families."])
