"""Event files of a run, which TensorBoard shows without gaps and repetitions across interrupt, kill and resume."""

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


class RunEvents(TensorBoardLogger):
    """TensorBoard's logger in the folder of a run, which writes each metric once per step.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str):
        super().__init__(
            folder,
            name="",
            version="",
            default_hp_metric=False,
        )
        self.steps: dict[str, int | None] = {}  # the latest of each metric

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the metrics that this step does not have yet."""
        new = {name: value for name, value in metrics.items() if self.steps.get(name, -1) != step}
        self.steps.update(dict.fromkeys(new, step))
        super().log_metrics(new, step)

    def hide_from(self, step: int) -> None:
        """Let readers drop what earlier files have of this step and later ones, which a resumed run repeats."""
        started = SessionLog(status=SessionLog.START)
        self.experiment.file_writer.add_event(Event(step=step, session_log=started))


class LogBeforeSave(Callback):
    """Log a step before a checkpoint of it is saved, and hide steps that a resumed run repeats.

    Lightning logs after all callbacks: a run that is killed right after it has saved would resume without that point.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hide what was logged after the checkpoint that is resumed."""
        if trainer.is_global_zero:
            for logger in _of_run(trainer):
                logger.hide_from(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Log; what Lightning logs later is only what was added since."""
        if _of_run(trainer):
            trainer._logger_connector.update_train_step_metrics()


def _of_run(trainer: Trainer) -> list[RunEvents]:
    """Return the logger of the run if it is the only one; others would have each point twice."""
    ours = [logger for logger in trainer.loggers if isinstance(logger, RunEvents)]
    return ours if len(ours) == len(trainer.loggers) else []
