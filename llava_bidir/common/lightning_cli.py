"""LightningCLI whose errors name the config, and which loads checkpoints as data only."""

import linecache
import traceback
from contextlib import suppress
from pathlib import Path

import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from .errors import UserError

OUR_PACKAGES = ("llava_bidir", "probes")


class ConfiguredCLI(LightningCLI):
    """LightningCLI that rejects pickled checkpoints and duplicate keys, and names the config in library errors.

    Raises:
        UserError: A config contains a key twice or a value that Lightning rejects, or `--weights_only` is false.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Check the YAML files among the arguments, parse, and set `weights_only`."""
        for argument in args if isinstance(args, list) else []:
            file = Path(argument.removeprefix("--config="))
            if file.suffix in (".yaml", ".yml") and file.is_file():
                check_unique_keys(file)
        super().parse_arguments(parser, args)
        run = self.config.get(self.config.get("subcommand") or "") or {}
        if run.get("weights_only") is False:
            raise UserError("--weights_only false is not supported: checkpoints are never loaded as pickles")
        if "weights_only" in run:
            run["weights_only"] = True  # Lightning would load pickles from a URL

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently replace the command line's settings by the checkpoint's.

        `fit` raises if they differ (`check_resume_compatible`).
        """

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; errors of libraries are errors of the config, those of our code are bugs."""
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except Exception as error:
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            if frame.f_globals.get("__name__", "").partition(".")[0] in OUR_PACKAGES:
                raise
            source = linecache.getline(frame.f_code.co_filename, line).strip()  # often names the setting
            raise UserError(f"config: {type(error).__name__}: {error} (at `{source}`)") from error


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"the key {key!r} occurs twice")
        return super().construct_mapping(node, deep)


def check_unique_keys(file: Path) -> None:
    """Raise if a mapping in a YAML file contains a key twice; YAML would silently keep the last one.

    Raises:
        UserError: Names the file and the key.
    """
    try:
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # reported by the parser
            yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except UserError as error:
        raise UserError(f"config {file}: {error}") from None
