"""What the commands that train have in common: a LightningCLI for runs, its logs and its processes."""

import linecache
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from inspect import isroutine
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

from .checkpoints import AtomicCheckpointIO, SaveOnSignal, model_checkpoints
from .configs import find_key, take_configs
from .errors import OneLineErrors, UserError
from .progress import LogProgress
from .runs import hide_expected_messages
from .training_folder import StartOfRun

CONFIGURABLE = (
    Accelerator,
    Callback,
    CheckpointIO,
    ClusterEnvironment,
    LayerSync,
    Logger,
    Precision,
    Profiler,
    Strategy,
)
SET_BATCHES = "batches and schedule follow from data.batch_size, and are recorded so"
SETS_RATE = "the learning rate follows from model.learning_rate, and is recorded so"
REFUSED = {  # callbacks: why
    GradientAccumulationScheduler: SET_BATCHES,
    BatchSizeFinder: SET_BATCHES,
    LearningRateFinder: SETS_RATE,
    StochasticWeightAveraging: SETS_RATE,
    WeightAveraging: "its checkpoints have the average for the weights, so the run cannot be resumed",
    Timer: (
        "with it, or trainer.max_time, Lightning counts the epoch that is interrupted as complete, so the run could "
        "not be resumed; use trainer.max_steps"
    ),
}
# Where a logger of the user's writes: the folder of the run, unless it is given
LOGGER_FOLDERS = ("trainer.logger.init_args.save_dir", "trainer.logger.save_dir")
# Options of a command that reads the data of a config, on machines without the config's GPUs too.
ON_ONE_CPU = (
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.precision=32-true",
)


class ConfigParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line."""

    words: Sequence[str] = ()  # of the command

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Namespace:
        """Parse, and keep the words for errors."""
        self.words = args or ()
        return super().parse_args(args, *more, **kwargs)

    def source_of(self, option: str) -> str | None:
        """Return the config that sets an option."""
        return find_key(take_configs(self.words)[0], option)


class RunCLI(LightningCLI):
    """LightningCLI of a run in a folder, which rejects pickled checkpoints and duplicate keys.

    Errors of libraries name the config.

    Raises:
        UserError: A config contains a key twice, a value that Lightning rejects or a callback of `REFUSED`, or
            `--weights_only` is false.
    """

    # what a run writes into its folder, besides config, events and checkpoints
    results: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args, trainer_defaults: dict[str, Any], **kwargs):
        hide_expected_messages()
        self.words: Sequence[str] = kwargs.get("args") or ()
        super().__init__(
            *args,
            **kwargs,
            parser_class=ConfigParser,
            seed_everything_default=0,  # Deviates: transformers' Trainer, which LLaVA uses, has 42
            save_config_callback=StartOfRun,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,  # no --optimizer: the modules build theirs
            trainer_defaults={
                "enable_model_summary": False,  # its column "Mode" says train for the frozen model
                "use_distributed_sampler": False,  # the data have their own
                **trainer_defaults,
            },
        )

    def add_run_options(self, parser: LightningArgumentParser, out: str, content: str) -> None:
        """Add --out, with its default and what the folder contains, and --overwrite."""
        parser.add_argument(
            "--out", default=out, help=f"folder of the run: config, events, checkpoints, {content}"
        )
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="replace the run that OUT holds",
        )
        parser.link_arguments("out", "trainer.default_root_dir")
        if not _sets(self.words, LOGGER_FOLDERS):
            parser.link_arguments("out", LOGGER_FOLDERS[0])

    def instantiate_trainer(self, requeue: bool = False, **kwargs) -> Trainer:
        """Add the logger, atomic checkpoints, and lines of progress where no terminal shows a bar.

        Args:
            requeue: Whether the run saves and requeues its job on a signal of Slurm.
            **kwargs: Those of LightningCLI.
        """

        def setting(key):
            return self._get(self.config_init, key)

        if setting("trainer.logger") is None:
            kwargs["logger"] = TensorBoardLogger(
                setting("out"),
                name="",
                version="",
                default_hp_metric=False,
            )
        given = setting("trainer.plugins") or []
        given = given if isinstance(given, list) else [given]
        plugins = [*given, AtomicCheckpointIO()]
        if requeue:
            plugins.append(
                SLURMEnvironment(auto_requeue=False)
            )  # Lightning's own handlers may hang
        to_log = not sys.stderr.isatty() and setting("trainer.enable_progress_bar") is None
        if to_log:
            kwargs["enable_progress_bar"] = False
        trainer = super().instantiate_trainer(**kwargs, plugins=plugins)
        for callback in trainer.callbacks:
            for kind, why in REFUSED.items():
                if isinstance(callback, kind):
                    name = type(callback).__name__
                    raise UserError(f"the callback {name} is not supported: {why}")
        # loggers would put them into folders of their own
        for callback in model_checkpoints(trainer):
            callback.dirpath = callback.dirpath or str(
                Path(trainer.default_root_dir) / "checkpoints"
            )
        if to_log:
            trainer.callbacks.append(LogProgress())
        trainer.callbacks.append(SaveOnSignal(requeue))  # after those that count batches
        return trainer

    def parse_arguments(self, parser: LightningArgumentParser, args) -> None:
        """Parse, and set `weights_only`."""
        super().parse_arguments(parser, args)
        run = self.config.get(self.config.get("subcommand") or "") or {}
        if run.get("weights_only") is False:
            raise UserError(
                "--weights_only false is not supported: checkpoints are never loaded as pickles"
            )
        if "weights_only" in run:
            run["weights_only"] = True  # Lightning would load pickles from a URL

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently replace the command line's settings by the checkpoint's.

        `fit` raises if they differ (`common/identity.py`).
        """

    def check_inputs(self) -> None:
        """Raise if something that the command reads is missing, before anything is built."""

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; errors of libraries are errors of the config, those of our code are bugs."""
        check_classes(self.config)
        self.check_inputs()
        try:
            super().instantiate_classes()
        except UserError:
            raise
        except Exception as error:
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            if _package_of(frame.f_globals.get("__name__", "")) in map(
                _package_of, (__name__, type(self).__module__)
            ):
                raise
            # often names the setting
            text = f"{type(error).__name__}: {error}"
            source = linecache.getline(frame.f_code.co_filename, line).strip()
            raise UserError(f"config: {text} (at `{source}`)") from error


def _sets(words: Sequence[str], keys: Sequence[str]) -> bool:
    """Return whether the words of a command, or one of its configs, set one of these keys."""
    options = {word.partition("=")[0].removeprefix("--") for word in words}
    configs, _ = take_configs(words)
    return any(key in options or find_key(configs, key) for key in keys)


def _package_of(module: str) -> str:
    return module.partition(".")[0]


def check_classes(config: Any, key: str = "config") -> None:
    """Raise if a `class_path` names anything but a class of the kinds that a Trainer takes.

    Under a key of type Any, such as `data.options`, jsonargparse would call whatever it names, `os.system` too.

    Raises:
        UserError: Names the key.
    """
    if isinstance(config, Namespace | dict):
        config = dict(vars(config) if isinstance(config, Namespace) else config)
        if "class_path" in config and not _is_configurable(str(config["class_path"])):
            kinds = ", ".join(kind.__name__ for kind in CONFIGURABLE)
            raise UserError(
                f"{key}: class_path {config['class_path']!r} is not a subclass of any of {kinds}"
            )
        for name, value in config.items():
            check_classes(value, f"{key}.{name}".removeprefix("config."))
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_classes(value, f"{key}[{i}]")
    elif isroutine(config):
        raise UserError(f"{key}: a config cannot contain the function {config!r}; write a Callback")


def _is_configurable(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return False
    return (
        isinstance(cls, type)
        and issubclass(cls, CONFIGURABLE)
        and not issubclass(cls, LambdaCallback)
    )


def check_trainer(trainer: Trainer, required: dict[str, Any], why: str) -> None:
    """Raise a UserError if an option of the trainer has another value than the required one; 1 is not 1.0."""
    for name, value in required.items():
        found = getattr(trainer, name)
        if type(found) is not type(value) or found != value:
            raise UserError(f"trainer.{name} must be {value}, got {found}: {why}")
