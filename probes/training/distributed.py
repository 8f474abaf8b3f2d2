"""Collectives that make multi-GPU training match single-GPU training."""

import torch
from torch import Tensor


def rank_count() -> int:
    """Return the number of processes of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """Return the tensor of every process, f[R, ...], without gradient; f[1, ...] in a single process."""
    if rank_count() == 1:
        return x[None]
    tensors = [torch.empty_like(x) for _ in range(rank_count())]
    torch.distributed.all_gather(tensors, x.contiguous())
    return torch.stack(tensors)


def rank() -> int:
    """Return the index of this process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_reduce(x: Tensor) -> Tensor:
    """Replace the tensor by its sum over processes, in place, and return it."""
    if rank_count() > 1:
        torch.distributed.all_reduce(x)
    return x


def broadcast(x: Tensor, source: int) -> Tensor:
    """Replace the tensor by that of process `source`, in place, and return it."""
    if rank_count() > 1:
        if not x.is_contiguous():  # would be filled in the wrong order
            raise ValueError("only contiguous tensors can be broadcast")
        torch.distributed.broadcast(x, source)
    return x
