"""Decide on rank 0 and tell the other ranks, so that all do the same and files are read once."""

import signal
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


def run_on_all_ranks(trainer: Trainer, function: Callable[[], T]) -> T:
    """Start the ranks, as `Trainer.fit` does, and return `function()` of this one. `fit` then finds the ranks running.

    Raises:
        KeyboardInterrupt: After Ctrl-C; the other ranks are ended.
    """
    strategy = trainer.strategy

    def run() -> T:
        strategy.setup_environment()
        return function()

    if strategy.launcher is None:
        return run()
    try:
        return strategy.launcher.launch(run, trainer=trainer)
    except KeyboardInterrupt:
        strategy.launcher.kill(signal.SIGKILL)
        raise


def decide_before_fit(trainer: Trainer, function: Callable[[], T]) -> T:
    """Start the ranks, and return `rank_zero_result`."""
    return run_on_all_ranks(trainer, lambda: rank_zero_result(trainer, function))
