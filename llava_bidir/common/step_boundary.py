"""Steps at which something happens: checkpoints only where a run can be resumed exactly, and logs."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

CHECKPOINT = "checkpoints/last.ckpt"  # in the run's folder, where `--ckpt_path last` finds it


def at_step_boundary(trainer: Trainer) -> bool:
    """Return whether a checkpoint after this batch can be resumed exactly.

    It cannot within an optimizer step, because checkpoints hold no accumulated gradients. Nor can it after the last
    batch of an epoch, because Lightning would skip the validation of that epoch. The end of an epoch has a checkpoint
    of its own.
    """
    epoch = trainer.fit_loop.epoch_loop
    return not (epoch._should_accumulate() or epoch._is_training_done)


def save_interrupted(trainer: Trainer) -> None:
    """Save RUN/checkpoints/last.ckpt in `on_train_batch_end`, and log the step, for a callback that then ends the run.

    Lightning logs a step after that hook, so that the loggers would lack the step of the checkpoint.
    """
    trainer.save_checkpoint(Path(trainer.default_root_dir) / CHECKPOINT)
    trainer._logger_connector.update_train_step_metrics()


def is_logged(trainer: Trainer) -> bool:
    """Return whether `trainer.log_every_n_steps`, of which 0 is never, includes the current step."""
    return trainer.log_every_n_steps > 0 and trainer.global_step % trainer.log_every_n_steps == 0


class SaveAtStepBoundary(Callback):
    """Make every ModelCheckpoint that saves every n steps, or after a validation, wait for a step boundary.

    Without it, such a ModelCheckpoint also saves at the first micro-batch after a resume, where the number of steps is
    still that of the checkpoint.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let ModelCheckpoint remove the checkpoint that the run was resumed from when it has saved a newer one."""
        trainer.ckpt_path = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs,
        batch,
        batch_idx: int,
    ) -> None:
        """Mark the current step as saved if it is not a boundary."""
        if not at_step_boundary(trainer):
            for callback in trainer.checkpoint_callbacks:
                if not callback._every_n_epochs:  # the others save after a validation or an epoch
                    callback._last_global_step_saved = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the current step as saved after a validation within it (`trainer.val_check_interval`)."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            for callback in trainer.checkpoint_callbacks:
                callback._last_global_step_saved = trainer.global_step
