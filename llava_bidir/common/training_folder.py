"""The folder of a run of LightningCLI: what is decided before training, and what happens once it starts."""

from collections.abc import Mapping
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from .errors import UserError
from .identity import run_identity
from .rank_zero import decide_before_fit
from .run_folder import EVENTS, RunFolder, RunPlan, begin_run, plan_run


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


class NoEmptyEvents(Callback):
    """Delete the event files of TensorBoard of a run that ends with an error before its first batch.

    Lightning opens them before it sets up data and model. TensorBoard would mix those of failed starts with the run's.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.before = set(folder.glob(EVENTS))
        self.has_begun = False

    def on_train_batch_end(self, *args, **kwargs) -> None:
        """Keep the files from now on."""
        self.has_begun = True

    on_validation_batch_end = on_test_batch_end = on_train_batch_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Delete the files that this process has opened, unless it has done a batch."""
        if self.has_begun or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.finalize("failed")
        for file in set(self.folder.glob(EVENTS)) - self.before:
            file.unlink()


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
        """Write config.yaml and delete `replaced`."""
        # trainer.log_dir is the logger's, not the run's
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            begin_run(folder, self.parser.dump(self.config, skip_none=False), self.replaced)
        self.replaced = []
