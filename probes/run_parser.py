"""Parse the options of probe runs (`run_config.py`) from words and YAML files, without importing torch or Lightning.

An option that does not exist is an error that names the nearest one, and the file if it is in one.
"""

from argparse import SUPPRESS
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import jsonargparse

from llava_bidir.common.configs import check_unique_keys, with_config_paths
from llava_bidir.common.errors import UserError
from llava_bidir.common.option_names import check_options
from llava_bidir.common.options import help_texts
from llava_bidir.common.usage_errors import ShortUsageErrors

from .run_config import DataOptions, ModelOptions, RunConfig, SolverOptions

SECTIONS = {"model": ModelOptions, "data": DataOptions}
REQUIRED = ("model.mllm", "data.root")
OPTIONS_OF_FIT = Path(__file__).with_name("options.txt")  # as LightningCLI has them
CONFIG_HELP = "config by name or path; later ones replace the values of earlier ones"
TRAINER_HELP = "an option of Lightning's Trainer, such as devices, accelerator or precision"


class RunParser(ShortUsageErrors, jsonargparse.ArgumentParser):
    """Parser of a :class:`RunConfig`, to which a command can add options of its own.

    Args:
        prog: Name of the command.
        description: What it does.
        example: A command that works.
        optional: Those of `REQUIRED` that need not be given.
        without: Options that the command sets itself.
        solver: Whether the solver's are among the options.

    Attributes:
        required: Options that must be given, as in "data.root".
        options_of_fit: All options of the commands that LightningCLI parses, as in "--data.root".
    """

    def __init__(
        self,
        prog: str,
        description: str,
        example: str,
        optional: Collection[str] = (),
        without: Collection[str] = (),
        solver: bool = True,
    ):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example: {example}",
            allow_abbrev=False,
        )
        self.has_words = True  # where errors are those of a command
        self.required = [name for name in REQUIRED if name not in (*optional, *without)]
        self.without = without
        self.options_of_fit = OPTIONS_OF_FIT.read_text().split()
        self.add_argument("-c", "--config", action="config", help=CONFIG_HELP)
        for section, options in SECTIONS.items():
            self._add_fields(options, f"{section}.")
        if solver:
            self._add_fields(SolverOptions, "", "-")
        self._add_fields(RunConfig, "")
        self.add_argument("--trainer.NAME", default=SUPPRESS, help=TRAINER_HELP)
        for name in self.options_of_fit:
            if name.startswith("--trainer.") and not name.endswith((".help", "+")):
                self.add_argument(
                    name,
                    type=Any,
                    default=SUPPRESS,
                    help=SUPPRESS,
                )

    def _add_fields(
        self,
        options: type,
        prefix: str,
        separator: str = "_",
    ) -> None:
        """Add an option for each field of a dataclass that is none itself."""
        kinds = get_type_hints(options)
        texts = help_texts(options)
        for option in fields(options):
            name = f"{prefix}{option.name}"
            if option.name in (*SECTIONS, "solver", "trainer") or name in self.without:
                continue
            kind = {"type": kinds[option.name]}
            if option.name == "strengths":
                kind = {"type": float, "nargs": "+"}
            if name in self.required:
                kind["required"] = True
            elif option.default is not MISSING:
                kind["default"] = option.default
            flag = name.replace("_", separator)
            self.add_argument(f"--{flag}", help=texts[option.name], **kind)

    def read(self, words: Sequence[str]) -> jsonargparse.Namespace:
        """Return the values of words and configs.

        Raises:
            SystemExit: An option is unknown, missing or has an invalid value.
            UserError: There is no such config, it has a key twice, or it replaces the value of an option before it.
        """
        words = with_config_paths(words)
        check_options(self.prog, words, [*self._option_string_actions], self.required)
        check_unique_keys(words)
        return self.parse_args(words)

    def merge(
        self, values: jsonargparse.Namespace, options: Mapping[str, Any]
    ) -> jsonargparse.Namespace:
        """Return the values with options, nested as in YAML, in place of those that were read.

        Raises:
            UserError: An option is unknown or has an invalid value.
        """
        self.has_words = False
        return self.parse_object(options, values)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command with a usage error; of options from Python, raise a UserError."""
        if not self.has_words:
            raise UserError(" ".join(message.split()))
        super().error(message, ex)

    def run_config(self, values: jsonargparse.Namespace, **own: Any) -> RunConfig:
        """Return the options of the run among the values.

        Args:
            values: What was read.
            **own: Options that the command sets itself; those of a section are a dict.
        """
        given = jsonargparse.namespace_to_dict(values)
        for section, options in own.items():
            given[section] = given[section] | options if isinstance(options, dict) else options
        return RunConfig.from_values(given)
