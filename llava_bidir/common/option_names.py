"""Misspelt and missing options of commands that have hundreds: errors at once, without importing what defines them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .configs import OPTIONS as CONFIG
from .configs import find_config
from .usage_errors import ArgumentParser


def check_option_names(program: str, words: Sequence[str], file: Path) -> None:
    """End with a usage error if a word is an option that is not in `file`, which has the name of an option per line.

    Options of classes and dictionaries (`--trainer.logger.project`) are left to the command's own parser. A test
    compares the file with the options of the parsers.

    Raises:
        SystemExit: Names the option, and the one that was probably meant.
    """
    names = file.read_text().split()
    groups = {name.rpartition(".")[0] for name in names if not name.endswith(".help")}
    unknown = [word for word in words if word.startswith("--") and not _is_known(word.partition("=")[0], names, groups)]
    if unknown:
        parser = ArgumentParser(prog=program, add_help=False)
        for name in names:
            parser.add_argument(name)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def check_required(program: str, words: Sequence[str], required: Sequence[str]) -> None:
    """End with a usage error if neither the words nor a config that they name have a required option.

    A config that cannot be read is left to the command's own parser.

    Raises:
        SystemExit: Names the options that are missing.
    """
    if any(word.startswith(("--help", "--print_config")) for word in words):
        return
    given = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    configs = [after for word, after in zip(words, words[1:], strict=False) if word in CONFIG]
    configs += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    for name in configs:
        import yaml

        with suppress(OSError, ValueError, yaml.YAMLError):
            given += _keys(yaml.safe_load(Path(find_config(name)).read_text()))
    # a group ("--model.encoder FILE") gives its options; argparse takes the beginning of an option for it
    if missing := [f"--{option}" for option in required if not option.startswith(tuple(given))]:
        parser = ArgumentParser(prog=program, add_help=False)
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _keys(config: object, prefix: str = "") -> list[str]:
    """Return the names of the values of a config, as in "model.llm"; a group is no value."""
    if not isinstance(config, dict):
        return [prefix.removesuffix(".")]
    return [key for name, value in config.items() if value is not None for key in _keys(value, f"{prefix}{name}.")]


def _is_known(option: str, names: list[str], groups: set[str]) -> bool:
    """Return whether an option is in the list, the beginning of one, or below one that has no options in the list."""
    return any(name.startswith(option) or (option.startswith(f"{name}.") and name not in groups) for name in names)
