"""Misspelt and missing options of commands that have hundreds: errors at once, without importing what defines them."""

from collections.abc import Sequence
from pathlib import Path

from .configs import configs_in, read_values
from .errors import UserError
from .usage_errors import ArgumentParser


def check_options(
    program: str,
    words: Sequence[str],
    file: Path,
    required: Sequence[str],
) -> None:
    """End with a usage error if an option is unknown, or if neither the words nor their configs have a required one.

    Options of classes and dictionaries (`--trainer.logger.project`) are left to the command's own parser, and so is a
    config that cannot be read or has unknown keys. A test compares `file` with the options of the parsers.

    Args:
        program: Name of the command in the error.
        words: Arguments of the command.
        file: Has the name of an option per line.
        required: Names of options, as in "model.llm".

    Raises:
        SystemExit: Names the options that are unknown, with the one that was probably meant, or missing.
    """
    names = file.read_text().split()
    groups = {name.rpartition(".")[0] for name in names if not name.endswith(".help")}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    parser = ArgumentParser(prog=program, add_help=False)
    if unknown := [
        word for word in words if word.startswith("--") and not _is_known(word, names, groups)
    ]:
        for name in names:
            parser.add_argument(name)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if any(option in ("--help", "--print_config") for option in options):
        return
    try:
        configs = [read_values(name) for _, _, name in configs_in(words)]
    except (OSError, ValueError, UserError):
        return
    keys = [f"--{key}" for values in configs for key, value in values.items() if value is not None]
    # a group ("--model.encoder FILE") gives its options; argparse takes the beginning of an option for it
    missing = [f"--{name}" for name in required if not f"--{name}".startswith((*options, *keys))]
    if missing and all(_is_known(key, names, groups) for key in keys):
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _is_known(word: str, names: list[str], groups: set[str]) -> bool:
    """Return whether an option is in the list, the beginning of one, or below one that has no options in the list."""
    option = word.partition("=")[0]
    return any(
        name.startswith(option) or (option.startswith(f"{name}.") and name not in groups)
        for name in names
    )
