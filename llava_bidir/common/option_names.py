"""Misspelt and missing options of commands that have hundreds: errors at once, without importing what defines them."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from .configs import configs_in, read_values
from .errors import UserError
from .usage_errors import ArgumentParser


def check_options(
    program: str,
    words: Sequence[str],
    names: Sequence[str],
    required: Sequence[str],
) -> None:
    """End with a usage error if an option is unknown, or if neither the words nor their configs have a required one.

    Options of classes and dictionaries (`--trainer.logger.project`) are left to the command's own parser, and so is a
    config that cannot be read.

    Args:
        program: Name of the command in the error.
        words: Arguments of the command.
        names: All options, as in "--model.llm".
        required: Names of options, as in "model.llm".

    Raises:
        SystemExit: Names the options that are unknown, with the one that was probably meant and the config that has it,
            or missing.
    """
    groups = {name.rpartition(".")[0] for name in names if not name.endswith(".help")}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    parser = ArgumentParser(prog=program, add_help=False)
    if unknown := [
        word for word in words if word.startswith("--") and not _is_known(word, names, groups)
    ]:
        for name in names:
            parser.add_argument(name)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    configs = _read_configs(words)
    of_keys = ["--" + name.removeprefix("--").replace("-", "_") for name in names]
    for file, values in configs.items():
        for key in values:
            if not _is_known(f"--{key}", of_keys, groups):
                parser.error(f"{file}: there is no option {key!r}{_meant(key, of_keys)}")
    if any(option in ("--help", "--print_config") for option in options):
        return
    keys = [
        f"--{key}"
        for values in configs.values()
        for key, value in values.items()
        if value is not None
    ]
    # a group ("--model.encoder FILE") gives its options; argparse takes the beginning of an option for it
    missing = [f"--{name}" for name in required if not f"--{name}".startswith((*options, *keys))]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _read_configs(words: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """Return the values of the configs that can be read, by their names."""
    configs = {}
    for _, _, name in configs_in(words):
        try:
            configs[name] = read_values(name)
        except (OSError, ValueError, UserError):
            continue
    return configs


def _meant(key: str, names: Iterable[str]) -> str:
    """Return the option that is most like an unknown one, for its error; "" if there is none."""
    meant = get_close_matches(f"--{key}", names, 1)
    return f"; did you mean {meant[0].removeprefix('--')!r}?" if meant else ""


def _is_known(word: str, names: Iterable[str], groups: set[str]) -> bool:
    """Return whether an option is in the list, a group of some, or below one that has no options in the list."""
    option = word.partition("=")[0].removesuffix("+")
    return any(
        name == option
        or name.startswith(f"{option}.")
        or (option.startswith(f"{name}.") and name not in groups)
        for name in names
    )
