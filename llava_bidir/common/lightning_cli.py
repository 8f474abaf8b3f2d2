"""What the commands that train have in common: a LightningCLI for runs in a folder."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from .checkpoints import AtomicCheckpointIO, Checkpoints
from .cli import Seed, join_values
from .errors import OneLineErrors, UserError, error_context
from .files import exclusive_run_lock, write_files
from .known_messages import hide_known_messages
from .progress import PROGRESS, StepProgress
from .runs import (
    RunFolder,
    RunPlan,
    begin_run,
    interrupt_says_how_to_resume,
    optimizer_steps,
    plan_run,
)

log = logging.getLogger(__name__)

AVERAGES = "a run is scored and exported with the weights of its last step, not with averages"
BATCHES = "the run would not record its batches; set data.batch_size"
# Callbacks that change batches, rates or weights so that a run neither records nor resumes them, and what to do
REFUSED = {
    BatchSizeFinder: BATCHES,
    GradientAccumulationScheduler: BATCHES,
    LearningRateFinder: "the run would not record its rate; set model.learning_rate",
    StochasticWeightAveraging: AVERAGES,
    Timer: "trainer.max_time would count the epoch that it ends as complete; set trainer.max_steps",
    WeightAveraging: AVERAGES,
}


# A config imports and calls, also under a key of type Any, nothing but these; `--import FILE.py` adds a module
set_parsing_settings(
    import_path_denylist=["*"], import_path_allowlist=["lightning", "llava_bidir", "probes"]
)


class ConfigParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, whose errors are one line, and whose words are typed as those of other commands.

    Attributes:
        first_words: Options that take words without a name, in this order.
    """

    first_words: tuple[str, ...] = ()

    def parse_args(self, args: Sequence[str], *more: Any, **settings: Any) -> Namespace:
        """Parse words; those of a subcommand are left to its own parser."""
        if self._subcommands_action is None:
            args = join_values(self, args, dict.fromkeys(self.first_words, 1))
        return super().parse_args(args, *more, **settings)


class RunCLI(LightningCLI):
    """LightningCLI of a run in a folder, which it starts, resumes or replaces.

    Raises:
        UserError: A config has a callback of `REFUSED`.
    """

    words_parser = ConfigParser

    def __init__(self, *args, trainer_defaults: dict[str, Any], **kwargs):
        hide_known_messages()
        super().__init__(
            *args,
            **kwargs,
            parser_class=self.words_parser,
            save_config_callback=StartOfRun,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,  # no --optimizer: the modules build theirs
            trainer_defaults={
                "enable_model_summary": False,  # its column "Mode" says train for the frozen model
                "use_distributed_sampler": False,  # the data have their own
                **trainer_defaults,
            },
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the seed, whose range Lightning would not check here."""
        parser.add_argument(
            "--seed_everything",
            type=Seed,
            default=0,  # Deviates: transformers' Trainer, which LLaVA uses, has 42
            help="seed of all random numbers",
        )

    def add_run_options(self, parser: LightningArgumentParser, out: str, content: str) -> None:
        """Add --out, with its default and what the folder contains, --overwrite and --checkpoints."""
        parser.add_argument(
            "--out", default=out, help=f"folder of the run: config, events, checkpoints, {content}"
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="replace the run that OUT holds"
        )
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")

    def instantiate_trainer(self, **kwargs) -> Trainer:
        """Add the logger, atomic checkpoints, and lines of progress where no terminal shows a bar."""
        setting = partial(self._get, self.config_init)
        if setting("trainer.logger") is None:
            logger = TensorBoardLogger(setting("out"), name="", version="", default_hp_metric=False)
            kwargs["logger"] = logger
        plugins = setting("trainer.plugins") or []
        if not isinstance(plugins, list):
            plugins = [plugins]
        plugins = [*plugins, AtomicCheckpointIO()]
        if SLURMEnvironment.detect():  # Lightning's own handlers may hang
            plugins.append(SLURMEnvironment(auto_requeue=False))
        to_log = not sys.stderr.isatty() and setting("trainer.enable_progress_bar") is None
        if to_log:
            kwargs["enable_progress_bar"] = False
        with error_context("trainer"):
            trainer = super().instantiate_trainer(**kwargs, plugins=plugins)
        for name in ("val_check_interval", "check_val_every_n_epoch"):
            if getattr(trainer, name) == 0:
                raise UserError(f"trainer.{name} must be above 0")
        for callback in trainer.callbacks:
            for refused, why in REFUSED.items():
                if isinstance(callback, refused):
                    raise UserError(
                        f"the callback {type(callback).__name__} is not supported: {why}"
                    )
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(trainer, name) == 0:
                raise UserError(f"trainer.{name} is 0, so nothing would be trained; set at least 1")
        trainer.callbacks.insert(0, Progress(lines=to_log))
        return trainer

    @contextmanager
    def started(self, folder: RunFolder, ckpt_path: str | None) -> Iterator[RunPlan]:
        """Yield what this `fit` does with its folder, which is locked, and say after Ctrl-C how to go on.

        All ranks find the same files, and decide for themselves.

        Raises:
            UserError: Another process trains in the folder, or see :func:`.runs.plan_run`.
        """
        lock = exclusive_run_lock(folder.path) if self.trainer.is_global_zero else nullcontext()
        with lock, interrupt_says_how_to_resume():
            overwrite = self.config.get(str(self.subcommand), self.config)["overwrite"]
            plan = plan_run(folder, ckpt_path, overwrite)
            for callback in self.trainer.callbacks:
                if isinstance(callback, StartOfRun):
                    callback.replaced = plan.replaced
            yield plan

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would silently replace the command line's settings by the checkpoint's.

        `fit` raises if they differ (`identity.py`).
        """


class StartOfRun(SaveConfigCallback):
    """Write config.yaml, and delete the results of the run that is replaced, once training starts.

    By then all settings were accepted: a command that is rejected changes nothing.

    Attributes:
        replaced: What is deleted.
    """

    replaced: Sequence[Path] = ()

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: Lightning would write config.yaml before the model is built."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a run that trains nothing."""
        if trainer.global_step == 0:
            self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml, delete `replaced`, and hide from TensorBoard the steps that a resumed run repeats."""
        if not trainer.is_global_zero:
            return
        config = self.parser.dump(self.config, skip_none=False)
        begin_run(Path(trainer.default_root_dir), config, self.replaced)
        self.replaced = ()
        for logger in trainer.loggers:
            # as its `purge_step`, which has to be known before the checkpoint is read
            if isinstance(logger, TensorBoardLogger):
                started = SessionLog(status=SessionLog.START)
                event = Event(step=trainer.global_step, session_log=started)
                logger.experiment.file_writer.add_event(event)


class Progress(Callback):
    """Write how far the training is to RUN/progress.json, which `llava-bidir status` reads.

    Args:
        lines: Log it too, where a bar would write one line with thousands of carriage returns into a log.
    """

    def __init__(self, lines: bool):
        self.lines = lines

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, which the time left follows from."""
        self.started = time.monotonic()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Any], *args: Any
    ) -> None:
        """Write after every `trainer.log_every_n_steps` steps, and after the last one of an epoch."""
        loop = trainer.fit_loop.epoch_loop
        step = trainer.global_step
        every = trainer.log_every_n_steps
        is_due = (every > 0 and step % every == 0) or loop._is_training_done
        if not trainer.is_global_zero or not is_due or loop._should_accumulate():
            return
        steps = optimizer_steps(trainer)
        loss = float(trainer.callback_metrics.get("train/loss", outputs["loss"]))
        if self.lines:
            log.info(f"step {step} of {steps}, loss {loss:.4g}")
        step_s = (time.monotonic() - self.started) / max(step - self.first_step, 1)
        speed = trainer.callback_metrics.get("train/samples_per_s")
        if speed is not None:
            speed = float(speed)
        progress = StepProgress(
            done=step, of=steps, left_s=(steps - step) * step_s, loss=loss, samples_per_s=speed
        )
        write_files({Path(trainer.default_root_dir) / PROGRESS: vars(progress)})


def check_trainer(trainer: Trainer, required: dict[str, Any], why: str) -> None:
    """Raise a UserError if an option of the trainer has another value than the required one; 1 is not 1.0."""
    for name, value in required.items():
        setting = getattr(trainer, name)
        if type(setting) is not type(value) or setting != value:
            raise UserError(f"trainer.{name} must be {value}, got {setting}: {why}")
