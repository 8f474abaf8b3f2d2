"""Where a run of solved probes computes: its device, precision and processes.

One process needs torch only. Several are started by Lightning's Fabric, as torchrun, Slurm or trainer.devices ask for.
"""

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch

from llava_bidir.common.errors import UserError

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
# Arguments of Lightning's Trainer that solved probes have, too
OF_FABRIC = ("accelerator", "devices", "num_nodes", "strategy")
OPTIONS = (*OF_FABRIC, "precision", "enable_progress_bar")
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

    def forward_context(self) -> AbstractContextManager:
        """Return the context of a forward at the precision."""
        if self.precision == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


class FabricMachine(Machine):
    """Processes that Lightning's Fabric starts, or finds started by torchrun, Slurm or MPI.

    Args:
        options: Arguments of Fabric by name.
        precision, progress: As for :class:`Machine`.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        precision: str,
        progress: ProgressKind,
    ):
        from lightning.fabric import Fabric  # seconds, which one process does not need

        self.fabric = Fabric(**options)
        super().__init__(self.fabric.device, precision, progress)
        self.is_first = self.fabric.is_global_zero
        self.processes_here = max(1, len(getattr(self.fabric.strategy, "parallel_devices", [0])))

    def run(self, function: Callable[[], None]) -> None:
        """Start the processes that are missing, and call a function in each of them."""
        try:
            self.fabric.launch(lambda fabric: function())
        except KeyboardInterrupt:  # the others may wait for this one
            for process in getattr(self.fabric.strategy.launcher, "procs", ()):
                process.send_signal(signal.SIGKILL)
            raise


def solver_device(device: torch.device) -> torch.device:
    """Return where states of a device are solved and scored: not on a Mac's GPU, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def build_machine(options: Mapping[str, Any]) -> Machine:
    """Return the machine that options of the trainer ask for.

    Args:
        options: Arguments of Lightning's Trainer by name.

    Raises:
        UserError: An option has no meaning for solved probes.
    """
    if unknown := [name for name in options if name not in OPTIONS + OF_FIT]:
        raise UserError(
            f"trainer.{unknown[0]} has no meaning for solved probes; expected {', '.join(OPTIONS)}"
        )
    precision = str(options.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision of solved probes must be 32-true or bf16-mixed, got {precision}"
        )
    device = device_of_one_process(options)
    progress = progress_kind(options.get("enable_progress_bar"))
    if device is not None:
        return Machine(device, PRECISIONS[precision], progress)
    of_fabric = {name: options[name] for name in OF_FABRIC if name in options}
    return FabricMachine(of_fabric, PRECISIONS[precision], progress)


def device_of_one_process(options: Mapping[str, Any]) -> torch.device | None:
    """Return the device of a run of one process; None of several processes, and of a device that Fabric must find."""
    if any(os.environ.get(name, "1") != "1" for name in COUNT_VARIABLES):
        return None
    if str(options.get("num_nodes", 1)) != "1":
        return None
    if str(options.get("strategy", "auto")) not in ("auto", "ddp"):
        return None
    kind = str(options.get("accelerator", "auto"))
    devices = str(options.get("devices", "auto"))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and not gpus and not torch.backends.mps.is_available()):
        return torch.device("cpu") if devices in ("auto", "1") else None
    if kind in ("auto", *ON_GPU) and gpus:
        is_one = devices in ("1", "[0]") or (devices == "auto" and gpus == 1)
        return torch.device("cuda", 0) if is_one else None
    return None


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
