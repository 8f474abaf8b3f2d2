"""What every process of a run sets up, and takes down at its end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def run_process(matmul_precision: str = "highest") -> Iterator[None]:
    """Log plain lines, and end the group of processes with the command.

    Args:
        matmul_precision: Of float32 products: "highest", or "high" for TF32 on GPUs. What it was before comes back, so
            that no command of a process changes what the next one computes.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        # Lightning destroys NCCL groups only; a process that exits with running gloo threads may abort
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
