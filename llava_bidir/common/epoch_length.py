"""Length of a training epoch, for schedules and for the position of a resumed run."""

from lightning import Trainer


def batches_per_epoch(batches: int, trainer: Trainer) -> int:
    """Return how many of its batches a rank trains in an epoch: at most `trainer.limit_train_batches`, at least one."""
    limit = trainer.limit_train_batches  # a number, or a share
    return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))
