"""Where a run of solved probes computes: its device, precision and processes.

One process needs torch only. Several processes, and options of the trainer that are not in the tables below, are those
of Lightning (`lightning_machine.py`), which takes seconds to import.
"""

import os
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

ProgressKind = Literal["bar", "lines", "none"]

PRECISIONS = {
    "32": "32-true",
    "32-true": "32-true",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
}
ON_GPU = ("gpu", "cuda")
# Number of processes, as torchrun, Slurm and MPI tell it
COUNT_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
ONE = {
    "accelerator": ("auto", "cpu", *ON_GPU),
    "devices": ("auto", "1", "[0]"),
    "num_nodes": ("1",),
    "strategy": ("auto", "ddp"),
    "precision": tuple(PRECISIONS),
    "enable_progress_bar": ("True", "False", "None"),
}  # values, as text, with which a run is one process
# Numbers of configs for `probes fit`, without a meaning for solved probes
OF_FIT = (
    "max_epochs",
    "max_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
)


class Machine:
    """One process on one device.

    Args:
        device: Where the model runs.
        precision: "32-true", or "bf16-mixed" for a forward under autocast.
        progress: How the progress of a pass is shown.
    """

    is_first = True  # of all processes of the run
    processes_here = 1  # on this machine

    def __init__(
        self,
        device: torch.device,
        precision: str = "32-true",
        progress: ProgressKind = "bar",
    ):
        self.device = device
        self.precision = precision
        self.progress = progress

    def run(self, function: Callable[[], None]) -> None:
        """Call a function in every process of the run."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        function()

    def convert_module(self, module: nn.Module) -> None:
        """Convert the weights of a module to the precision."""

    def convert_input(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch in the precision."""
        return batch

    def forward_context(self) -> AbstractContextManager:
        """Return the context of a forward at the precision."""
        if self.precision == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def log_settings(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Tell the loggers of the run its settings; there is none."""


def solver_device(device: torch.device) -> torch.device:
    """Return where states of a device are solved and scored: not on a Mac's GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def one_process(options: Mapping[str, Any]) -> Machine | None:
    """Return the machine that options of the trainer ask for; None if it is not one process or they are Lightning's.

    Args:
        options: Arguments of Lightning's Trainer by name.
    """
    own = {name: str(value) for name, value in options.items() if name not in OF_FIT}
    if any(text not in ONE.get(name, ()) for name, text in own.items()):
        return None
    numbers = [options[name] for name in OF_FIT if name in options]
    if any(not isinstance(x, int | float | None) for x in numbers):
        return None
    if any(os.environ.get(name, "1") != "1" for name in COUNT_VARIABLES):
        return None
    kind = own.get("accelerator", "auto")
    on_gpu = kind in ON_GPU or (kind == "auto" and torch.cuda.is_available())
    if kind == "auto" and torch.backends.mps.is_available():
        return None
    all_gpus = own.get("devices", "auto") == "auto"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if on_gpu and (gpus == 0 or (all_gpus and gpus > 1)):
        return None
    return Machine(
        torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        PRECISIONS[own.get("precision", "32-true")],
        progress_kind(options.get("enable_progress_bar")),
    )


def progress_kind(show_bar: bool | None) -> ProgressKind:
    """Return how progress is shown: by default as a bar on a terminal, else as lines of a log."""
    if show_bar is None:
        return "bar" if sys.stderr.isatty() else "lines"
    return "bar" if show_bar else "none"


def seed_everything(seed: int) -> None:
    """Set the seeds of the generators of torch, numpy and Python, which a module of a user's may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
