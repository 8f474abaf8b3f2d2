"""The YAML files of configs/, found by name in a clone and in an installed package: `-c stage2 -c clip -c zero3`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .usage_errors import did_you_mean

FOLDER = Path(__file__).parents[1] / "configs"  # in a clone a link to configs/, in a wheel a copy
if not FOLDER.is_dir():  # a clone on a system without links
    FOLDER = Path(__file__).parents[2] / "configs"
OPTIONS = ("-c", "--config")


def config_names() -> dict[str, Path]:
    """Return the files by name: "FOLDER/STEM", and "STEM" where no other file has it or the file is in no folder."""
    files = sorted(
        FOLDER.rglob("*.yaml"), key=lambda file: (len(file.relative_to(FOLDER).parts), file)
    )
    names: dict[str, Path] = {}
    for file in files:
        names[file.relative_to(FOLDER).with_suffix("").as_posix()] = file
    for file in files:
        names.setdefault(file.stem, file)
    stems = [file.stem for file in files if file.parent != FOLDER]
    return {
        name: file
        for name, file in names.items()
        if "/" in name or file.parent == FOLDER or stems.count(name) == 1
    }


def find_config(name: str) -> str:
    """Return the path of a config: `name` itself if it is a file, else that of the config of this name.

    Raises:
        UserError: There is no such file and no config of this name.
    """
    # jsonargparse takes YAML text, too
    if "\n" in name or (Path(name).exists() and not Path(name).is_dir()):
        return name
    names = config_names()
    if name not in names:
        raise UserError(
            f"there is no config {name!r} in {FOLDER}, and no such file{did_you_mean(name, names)}"
        )
    return str(names[name])


def configs_in(argv: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Yield each config of a command: the index of its word, what stands before the name in it, and the name."""
    for i, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option in OPTIONS and equals:
            yield i, f"{option}=", value
        elif word in OPTIONS and i + 1 < len(argv):
            yield i + 1, "", argv[i + 1]


def read_values(config: str) -> dict[str, Any]:
    """Return the values of a config, by names as in "model.llm".

    Raises:
        UserError: There is no such config.
        OSError, ValueError: It cannot be read, or is no YAML.
    """

    def values(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        parts = ((f"{name}.{key}" if name else f"{key}", part) for key, part in value.items())
        return {leaf: x for key, part in parts for leaf, x in values(part, key).items()}

    source = find_config(config)
    try:
        content = yaml.safe_load(
            source if "\n" in source else Path(source).read_text(encoding="utf-8")
        )
    except yaml.YAMLError as error:
        raise ValueError from error
    return values(content or {}, "")


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"the key {key!r} occurs twice")
        return super().construct_mapping(node, deep)


def check_unique_keys(argv: Sequence[str]) -> None:
    """Raise if a YAML file of a command has a key twice in a mapping; YAML would silently keep the last one.

    Raises:
        UserError: Names the file and the key.
    """
    for word in argv:
        file = Path(re.sub(r"^(--config=|-c=|-c)", "", word))
        if file.suffix not in (".yaml", ".yml") or not file.is_file():
            continue
        try:
            with suppress(yaml.YAMLError, UnicodeDecodeError):  # reported by the parser
                yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
        except UserError as error:
            raise UserError(f"config {file}: {error}") from None


def check_order(argv: Sequence[str]) -> None:
    """Raise if a config replaces the value of an option before it; configs and options count from left to right.

    An option that comes again after the config has its last value.

    Raises:
        UserError: Names the option and the config.
    """
    for i, _, name in configs_in(argv):
        lost = [option for option in _options(argv[:i]) if option not in _options(argv[i:])]
        if not lost:
            continue
        try:
            keys = [f"--{key}." for key in read_values(name)]
        except (OSError, ValueError):
            continue  # the command's own parser says what is wrong
        for option in lost:
            if any(key.startswith(f"{option}.") or f"{option}.".startswith(key) for key in keys):
                raise UserError(
                    f"{option} comes before the config {name}, which would replace its value; put options after -c"
                )


def _options(words: Sequence[str]) -> list[str]:
    return [word.partition("=")[0].rstrip("+") for word in words if word.startswith("--")]


def with_config_paths(argv: Sequence[str]) -> list[str]:
    """Return the words of a command with each value of `-c` replaced by the path of its config.

    Raises:
        UserError: There is no such config, or it replaces the value of an option before it.
    """
    check_order(argv)
    words = list(argv)
    for i, before, name in configs_in(argv):
        words[i] = before + find_config(name)
    return words
