"""Misspelt options of the commands that take hundreds: an error at once, without importing what defines the options."""

from collections.abc import Sequence
from pathlib import Path

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


def _is_known(option: str, names: list[str], groups: set[str]) -> bool:
    """Return whether an option is in the list, the beginning of one, or below one that has no options in the list."""
    return any(name.startswith(option) or (option.startswith(f"{name}.") and name not in groups) for name in names)
