"""Misspelt and missing options of commands that have hundreds: errors at once, without importing what defines them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .configs import configs_in, read_values
from .errors import UserError
from .usage_errors import ArgumentParser, did_you_mean

OF_GROUP = (
    "model",
    "data",
)  # groups of options, which in LightningCLI's subclass mode select a class


def check_options(
    program: str,
    words: Sequence[str],
    names: Sequence[str],
    required: Sequence[str],
    absent: Mapping[str, str] | None = None,
) -> None:
    """End with a usage error if an option is unknown, or if neither the words nor their configs have a required one.

    Options of classes and dictionaries (`--trainer.logger.project`) are left to the command's own parser, and so is a
    config that cannot be read.

    Args:
        program: Name of the command in the error.
        words: Arguments of the command.
        names: All options, as in "--model.llm".
        required: Names of options, as in "model.llm".
        absent: What there is instead of options that LightningCLI has elsewhere, by "optimizer", "lr_scheduler",
            "model" and "data"; the latter two are of a `class_path`.

    Raises:
        SystemExit: Names the options that are unknown, with the one that was probably meant and the config that has it,
            or missing.
    """
    groups = {name.rpartition(".")[0] for name in names if not name.endswith(".help")}
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    parser = ArgumentParser(prog=program, add_help=False)
    configs = _read_configs(words)
    _check_absent(parser, words, configs, absent or {})
    if unknown := [
        word for word in words if word.startswith("--") and not _is_known(word, names, groups)
    ]:
        for name in names:
            parser.add_argument(name)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    command = program.rpartition(" ")[2]
    of_keys = ["--" + name.removeprefix("--").replace("-", "_") for name in names]
    for file, values in configs.items():
        for key in values:
            if key.startswith(f"{command}."):
                parser.error(f"{file}: leave out the level {command!r}, below which the keys are")
            if not _is_known(f"--{key}", of_keys, groups):
                parser.error(
                    f"{file}: there is no option {key!r}{did_you_mean(f'--{key}', of_keys)}"
                )
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


def _check_absent(
    parser: ArgumentParser,
    words: Sequence[str],
    configs: Mapping[str, Mapping[str, Any]],
    absent: Mapping[str, str],
) -> None:
    """End with a usage error if a word or a key of a config selects a class that is fixed."""
    names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    asked = {f"--{name}": name for name in names}
    asked |= {f"{file}: {key}": key for file, values in configs.items() for key in values}
    for subject, key in asked.items():
        group, _, part = key.partition(".")
        of_class = part.partition(".")[0] in ("class_path", "init_args")
        if group in absent and (group not in OF_GROUP or of_class):
            parser.error(f"{subject} is no option: {absent[group]}")
    for option, value in _values(words):
        group = option.removeprefix("--")
        # jsonargparse takes a file with the options of a group
        if group in absent and group in OF_GROUP and not _is_config(value):
            parser.error(f"{option} selects no class: {absent[group]}")


def _values(words: Sequence[str]) -> list[tuple[str, str]]:
    """Return each option with the word after it, or after its "="."""
    pairs = [*pairwise([*words, ""])]
    pairs += [tuple(word.split("=", 1)) for word in words if "=" in word]
    return [(option, value) for option, value in pairs if option.startswith("--")]


def _is_config(value: str) -> bool:
    return "{" in value or "\n" in value or Path(value).is_file()


def _read_configs(words: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """Return the values of the configs that can be read, by their names."""
    configs = {}
    for _, _, name in configs_in(words):
        try:
            configs[name] = read_values(name)
        except (OSError, ValueError, UserError):
            continue
    return configs


def _is_known(word: str, names: Iterable[str], groups: set[str]) -> bool:
    """Return whether an option is in the list, a group of some, or below one that has no options in the list."""
    option = word.partition("=")[0].removesuffix("+")
    return any(
        name == option
        or name.startswith(f"{option}.")
        or (option.startswith(f"{name}.") and name not in groups)
        for name in names
    )
