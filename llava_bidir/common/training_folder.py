"""The folder of a run of LightningCLI: what is decided before training, and what happens once it starts."""

from collections.abc import Mapping
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from .errors import UserError
from .identity import run_identity
from .processes import decide_before_fit
from .runs import RunFolder, RunPlan, begin_run, plan_run


def plan_training(
    cli: LightningCLI,
    ckpt_path: str | None,
    folder: RunFolder,
    advice_of: Mapping[str, str] | None = None,
) -> RunPlan:
    """Decide on rank 0 whether to start, resume or replace the run in a folder, and return the same plan on all ranks.

    Args:
        cli: Its model, data and trainer; `--overwrite`.
        ckpt_path: "last", a path, or None to start a new run.
        folder: The folder of the run.
        advice_of: What to do where a setting differs from the finished run's, by setting.

    Raises:
        UserError: No step would be made; and see :func:`.run_folder.plan_run`.
    """
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(cli.trainer, name) == 0:
            raise UserError(
                f"trainer.{name} is 0, so nothing would be trained; for a trial, use trainer.max_steps 1 and another "
                "--out"
            )
    overwrite = cli.config.get(str(cli.subcommand), cli.config)["overwrite"]

    def plan() -> RunPlan:
        identity = run_identity(cli.trainer, cli.model, cli.datamodule)
        return plan_run(folder, identity, ckpt_path, overwrite, advice_of)

    run = decide_before_fit(cli.trainer, plan)
    cli.model.identity = run.identity
    for callback in cli.trainer.callbacks:
        if isinstance(callback, StartOfRun):
            callback.replaced = run.replaced
    return run


class StartOfRun(SaveConfigCallback):
    """Write config.yaml, and delete the results of the run that is replaced, once training starts.

    By then all settings were accepted: a command that is rejected changes nothing.

    Attributes:
        replaced: What is deleted.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.replaced: list[Path] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing: Lightning would write config.yaml before the model is built."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml, delete `replaced`, and hide from TensorBoard the steps that a resumed run repeats."""
        # trainer.log_dir is the logger's, not the run's
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            begin_run(folder, self.parser.dump(self.config, skip_none=False), self.replaced)
        self.replaced = []
        for logger in trainer.loggers:
            # as its `purge_step`, which has to be known before the checkpoint is read
            if isinstance(getattr(logger, "experiment", None), SummaryWriter):
                started = SessionLog(status=SessionLog.START)
                event = Event(step=trainer.global_step, session_log=started)
                logger.experiment.file_writer.add_event(event)
