"""Where a run of solved probes computes, as Lightning's Trainer says: several processes, loggers, any precision."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lightning import Trainer
from torch import nn

from llava_bidir.common.processes import run_on_all_ranks
from llava_bidir.common.progress import logs_progress
from probes.machine import Machine
from probes.run_config import RunConfig

from .cli import build_run


class LightningMachine(Machine):
    """The processes, device and precision of a Trainer, whose loops are not used.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer):
        progress = "none" if trainer.progress_bar_callback is None else "bar"
        super().__init__(
            trainer.strategy.root_device,
            trainer.precision,
            "lines" if logs_progress(trainer) else progress,
        )
        self.trainer = trainer
        self.is_first = trainer.is_global_zero
        self.processes_here = max(1, trainer.num_devices)

    def run(self, function: Callable[[], None]) -> None:
        """Start the processes as the Trainer does, and call a function in each of them."""

        def run() -> None:
            self.device = self.trainer.strategy.root_device
            function()

        run_on_all_ranks(self.trainer, run)

    def convert_module(self, module: nn.Module) -> None:
        """Convert the weights of a module to the precision."""
        self.trainer.precision_plugin.convert_module(module)

    def convert_input(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch in the precision."""
        return self.trainer.precision_plugin.convert_input(batch)

    def forward_context(self) -> AbstractContextManager:
        """Return the context of a forward at the precision."""
        return self.trainer.precision_plugin.forward_context()

    def log_settings(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Tell the loggers of the run its settings."""
        for logger in self.trainer.loggers:
            logger.log_hyperparams(settings)
            logger.save()
            logger.finalize("success")


def build_machine(config: RunConfig) -> LightningMachine:
    """Return the machine of a run, whose options LightningCLI checks."""
    return LightningMachine(build_run(config, "probes solve").trainer)
