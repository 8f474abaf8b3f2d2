"""LightningCLI for configs that somebody else wrote: they set values and name classes of the declared kinds, and
nothing else of them is executed.
"""

import traceback
from collections.abc import Iterator
from importlib import import_module
from inspect import isroutine
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Callback
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import UserError
from .hf_loading import check_pickle

ROOT = Path(__file__).parents[2]
CONFIG_BYTES, VALUES = 1_000_000, 100_000  # of a file, aliases counted as often as they are repeated
DECLARED = (
    *(Accelerator, Callback, CheckpointIO, ClusterEnvironment, LayerSync, Logger, LRScheduler, Optimizer, Precision),
    *(Profiler, Strategy),
)


class ConfiguredCLI(LightningCLI):
    """LightningCLI that looks at configs and checkpoints before anything is made of them.

    Raises:
        UserError: A config is no YAML of a sensible size, has a key twice, or names what is no class of a kind that
            the Trainer declares; or a checkpoint holds code, or is to be loaded as a pickle.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        for file in _config_files(args if isinstance(args, list) else []):
            check_yaml(file)
        super().parse_arguments(parser, args)
        run = self.config.get(self.config.get("subcommand") or "") or {}
        if run.get("weights_only") is False:
            raise UserError("--weights_only false: checkpoints are data here and are never loaded as pickles")
        if "weights_only" in run:
            run["weights_only"] = True  # Lightning would load pickles from an URL

    def _parse_ckpt_path(self) -> None:
        """Lightning puts the settings that a checkpoint names in place of those of the command line, silently. Here the
        command line counts, and where it differs `fit` says so (`check_resume_compatible`)."""

    def instantiate_classes(self) -> None:
        """All that a config says is known by now."""
        check_classes(self.config)
        run = self.config.get(self.config.get("subcommand") or "") or {}
        if run.get("ckpt_path") and Path(run["ckpt_path"]).is_file():
            check_pickle(Path(run["ckpt_path"]))
        try:
            super().instantiate_classes()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            if isinstance(error, UserError) or _is_ours(at.filename):
                raise  # says all that there is to say, or is a bug
            raise UserError(f"config: {type(error).__name__}: {error} (at `{at.line}`)") from error


def _config_files(args: list[str]) -> Iterator[Path]:
    """Files among the arguments: those behind -c or --config, and all that are called YAML."""
    for before, arg in zip(["", *args], args, strict=False):
        file = Path(arg.partition("=")[2] if arg.startswith("-") else arg)
        named_config = before in ("-c", "--config") or arg.startswith("--config=")
        if (named_config or file.suffix in (".yaml", ".yml")) and file.is_file():
            yield file


def check_yaml(file: Path) -> None:
    """
    Raises:
        UserError: The file is larger than 1 MB, not UTF-8, no YAML, has a key twice, of which YAML keeps the last, or
            has more than 100,000 values once its aliases are written out.
    """
    if file.stat().st_size > CONFIG_BYTES:
        raise UserError(f"config {file}: {file.stat().st_size:,} bytes, where {CONFIG_BYTES:,} are plenty")
    try:
        values = _count(yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader), {})
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"config {file}: {' '.join(str(error).split())}") from None
    if values > VALUES:
        raise UserError(f"config {file}: {values:,} values with its aliases written out; {VALUES:,} are plenty")


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values below a node; one that is repeated by aliases is looked at once and counted each time."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = VALUES + 1  # if it is met inside of itself
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in children if isinstance(key, yaml.ScalarNode)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"the key {twice!r} is there twice")
        children = [value for _, value in children]
    known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def check_classes(config: Any, key: str = "config") -> None:
    """Refuses what would be called when the config is made into objects, but is not of a declared kind.

    Where a key takes anything, jsonargparse calls whatever `class_path` names, `os.system` as well.

    Raises:
        UserError: Names the key.
    """
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, dict):
        if "class_path" in config:
            _check_class(config["class_path"], key)
        for name, value in config.items():
            check_classes(value, f"{key}.{name}".removeprefix("config."))
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_classes(value, f"{key}[{i}]")
    elif isroutine(config):
        raise UserError(f"{key}: a function cannot be given in a config, got {config!r}; write a Callback")


def _check_class(path: Any, key: str) -> None:
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, DECLARED)) or issubclass(found, LambdaCallback):
        kinds = ", ".join(kind.__name__ for kind in DECLARED)
        raise UserError(f"{key}: class_path {path!r} is no class that a config may name; there is {kinds}")


def _is_ours(file: str) -> bool:
    return any(Path(file).is_relative_to(ROOT / package) for package in ("llava_bidir", "probes"))
