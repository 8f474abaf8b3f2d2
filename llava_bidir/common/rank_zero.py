"""Decide on rank 0 and tell the other ranks, so that all do the same and files are read once."""

from collections.abc import Callable
from typing import TypeVar

from lightning import Trainer

from .errors import UserError

T = TypeVar("T")


def rank_zero_result(trainer: Trainer, function: Callable[[], T]) -> T:
    """Return rank 0's `function()` on every rank of a set-up strategy; its UserError is raised on every rank."""
    result = None
    error = None
    if trainer.is_global_zero:
        try:
            result = function()
        except UserError as raised:
            error = str(raised)
    result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        raise UserError(error)
    return result


def decide_before_fit(trainer: Trainer, function: Callable[[], T]) -> T:
    """Start the ranks, as `Trainer.fit` does, and return `rank_zero_result`. `fit` then finds the ranks running."""

    def decide() -> T:
        trainer.strategy.setup_environment()
        return rank_zero_result(trainer, function)

    launcher = trainer.strategy.launcher
    return launcher.launch(decide, trainer=trainer) if launcher else decide()
