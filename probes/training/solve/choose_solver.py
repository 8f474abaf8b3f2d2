"""The solver of a task, and how much of its states fits into memory."""

import torch

from probes.data.available_memory import available_memory
from probes.training.distributed import broadcast, rank_count

from .by_passes import PassSolver
from .checkpoints import SolverCheckpoints
from .in_memory import MemorySolver
from .least_squares_solver import LeastSquaresSolver
from .solver import SolveOptions, Solver
from .state_reader import StateReader

LEAST = 4  # images of each fold in memory, however little there is


def choose_solver(
    reader: StateReader, options: SolveOptions, checkpoints: SolverCheckpoints
) -> Solver:
    """Return the solver of the reader's task: in memory, if the states of all images fit, or by passes."""
    if reader.probes.task.loss is None:
        return LeastSquaresSolver(reader, options, checkpoints)
    images = len(reader.data.splits["training"])
    wanted = options.sample_images
    fit = images_that_fit(reader, options.folds) if wanted is None else wanted
    sample_images = broadcast(min(images, fit), 0)
    if sample_images == images:
        return MemorySolver(reader, options, checkpoints)
    return PassSolver(reader, options, checkpoints, sample_images)


def images_that_fit(reader: StateReader, folds: int) -> int:
    """Return the number of images whose states fit into a quarter of the memory, some of each fold at least."""
    mllm = reader.probes.mllm
    widths = [mllm.widths[site] for site in reader.probes.sites]
    tokens = mllm.grid[0] * mllm.grid[1]
    processes = max(1, reader.trainer.num_devices)  # of this machine
    kept = (
        int(available_memory() / 4 / mllm.state_bytes(reader.probes.sites))
        * rank_count()
        // processes
    )
    # tokens of a site in float32, with logits and copies, on the device
    solved = 12 * tokens * max(widths)
    if reader.device.type == "cuda":
        free = torch.cuda.mem_get_info(reader.device)[0]
    else:
        free = available_memory()
    return max(min(kept, int(free / 4 / solved)), LEAST * folds)
