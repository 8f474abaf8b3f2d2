"""Length of a training and of its epochs, for schedules and for the position of a resumed run."""

from lightning import Trainer

from .errors import UserError


def batches_per_epoch(batches: int, trainer: Trainer) -> int:
    """Return how many of its batches a rank trains in an epoch: at most `trainer.limit_train_batches`, at least one."""
    limit = trainer.limit_train_batches  # a number, or a share
    return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))


def optimizer_steps(trainer: Trainer) -> int:
    """Return the number of optimizer steps of the complete training, from its config.

    `trainer.estimated_stepping_batches` would start the data loader before the checkpoint's position is restored.

    Raises:
        UserError: It has no end.
    """
    # negative: no limit
    limits = trainer.datamodule.steps_per_epoch * trainer.max_epochs, trainer.max_steps
    if max(limits) < 0:
        raise UserError("the schedule needs an end: set trainer.max_epochs or trainer.max_steps")
    return min(limit for limit in limits if limit >= 0)
