"""Start the ranks of a run to agree on what it does before it begins, and say once what each of them would say."""

import logging
import os
import signal
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from .distributed import decide_on_first

if TYPE_CHECKING:  # seconds, which commands that do not train do not need
    from lightning import Trainer

log = logging.getLogger(__name__)
# what a command says, whatever the level of a notebook's or a test's root logger
log.setLevel(logging.INFO)

T = TypeVar("T")
# Index of a process, as torchrun, Slurm and Lightning tell it before the processes have met
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_rank_zero() -> bool:
    """Return whether this is the first process of its run."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    given = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return not given or given[0] == "0"


def rank_zero_info(message: str) -> None:
    """Log a message once for all processes."""
    if is_rank_zero():
        log.info(message)


def rank_zero_warn(message: str) -> None:
    """Warn once for all processes."""
    if is_rank_zero():
        warnings.warn(message, stacklevel=2)


def run_on_all_ranks(trainer: "Trainer", function: Callable[[], T]) -> T:
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


def decide_before_fit(trainer: "Trainer", function: Callable[[], T]) -> T:
    """Start the ranks, and return what the first one decides, see :func:`.distributed.decide_on_first`."""
    return run_on_all_ranks(trainer, lambda: decide_on_first(function))
