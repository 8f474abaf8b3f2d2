"""Where a run of solved probes computes: its device, precision and processes.

One process needs torch only. Several are started by Lightning's Fabric, as torchrun, Slurm or trainer.devices ask for.
"""

import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llava_bidir.common.errors import UserError, error_context
from probes.config import OF_FIT
from probes.steps.progress import ProgressKind

if TYPE_CHECKING:
    from lightning.fabric import Fabric

PRECISIONS = {
    "32": "32-true",
    "32-true": "32-true",
    "bf16": "bf16-mixed",
    "bf16-mixed": "bf16-mixed",
}
ON_GPU = ("auto", "gpu", "cuda")
# Number of processes, as torchrun, Slurm and MPI tell it
COUNT_VARIABLES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# Arguments of Lightning's Trainer that solved probes have, too
OF_FABRIC = ("accelerator", "devices", "num_nodes", "strategy")
OPTIONS = (*OF_FABRIC, "precision", "enable_progress_bar")


class Machine:
    """One process on one device, or processes that Lightning's Fabric starts, or finds started by a launcher.

    Args:
        device: Where the model runs.
        precision: "32-true", or "bf16-mixed" for a forward under autocast.
        progress: How the first process shows the progress of a pass.
        fabric: None for one process.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str = "32-true",
        progress: ProgressKind = "bar",
        fabric: "Fabric | None" = None,
    ):
        self.device = device
        self.precision = precision
        self.fabric = fabric
        self.is_first = fabric is None or fabric.is_global_zero  # of all processes of the run
        self.progress = progress if self.is_first else "none"
        strategy = getattr(fabric, "strategy", None)
        self.processes_here = len(getattr(strategy, "parallel_devices", None) or [0])

    @contextmanager
    def processes(self) -> Iterator[None]:
        """Start the processes that are missing; the context is then entered in every process of the run."""
        if self.fabric is None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            yield
            return
        try:
            self.fabric.launch()
            yield
        except KeyboardInterrupt:  # the others may wait for this one
            for process in getattr(self.fabric.strategy.launcher, "procs", ()):
                process.send_signal(signal.SIGKILL)
            raise

    def forward_context(self) -> AbstractContextManager:
        """Return the context of a forward at the precision."""
        if self.precision == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def solver_device(device: torch.device) -> torch.device:
    """Return where states of a device are solved and scored: not on a Mac's GPU, which has no float64."""
    if device.type == "mps":
        return torch.device("cpu")
    return device


def build_machine(options: Mapping[str, Any]) -> Machine:
    """Return the machine that options of the trainer ask for.

    Args:
        options: Arguments of Lightning's Trainer by name.

    Raises:
        UserError: An option has no meaning for solved probes.
    """
    for name in options:
        if name not in OPTIONS and f"trainer.{name}" not in OF_FIT:
            raise UserError(
                f"trainer.{name} has no meaning for solved probes; expected {', '.join(OPTIONS)}"
            )
    precision = str(options.get("precision", "32-true"))
    if precision not in PRECISIONS:
        raise UserError(
            f"trainer.precision of solved probes must be 32-true or bf16-mixed, got {precision}"
        )
    device = device_of_one_process(options)
    fabric = None
    if device is None:
        from lightning.fabric import Fabric  # seconds, which one process does not need

        of_fabric = {name: options[name] for name in OF_FABRIC if name in options}
        with error_context("trainer"):
            fabric = Fabric(**of_fabric)
        device = fabric.device
    progress = progress_kind(options.get("enable_progress_bar"))
    return Machine(device=device, precision=PRECISIONS[precision], progress=progress, fabric=fabric)


def device_of_one_process(options: Mapping[str, Any]) -> torch.device | None:
    """Return the device of a run of one process; None of several processes, and of a device that Fabric must find."""
    if (
        any(os.environ.get(name, "1") != "1" for name in COUNT_VARIABLES)
        or str(options.get("num_nodes", 1)) != "1"
        or options.get("strategy", "auto") not in ("auto", "ddp")
    ):
        return None
    kind = options.get("accelerator", "auto")
    devices = str(options.get("devices", "auto"))
    gpus = 0
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
    has_gpu = gpus or torch.backends.mps.is_available()
    if kind == "cpu" or (kind == "auto" and not has_gpu):
        is_one = devices in ("auto", "1")
        device = torch.device("cpu")
    else:
        is_one = devices in ("1", "[0]") or (devices == "auto" and gpus == 1)
        is_one = is_one and gpus and kind in ON_GPU
        device = torch.device("cuda", 0)
    return device if is_one else None


def progress_kind(show_bar: bool | None) -> ProgressKind:
    """Return how progress is shown: by default as a bar on a terminal, else as lines of a log."""
    if show_bar is None:
        show_bar = sys.stderr.isatty()
        return "bar" if show_bar else "lines"
    return "bar" if show_bar else "none"


def seed_everything(seed: int) -> None:
    """Set the seeds of the generators of torch, numpy and Python, which a module of a user's may draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
