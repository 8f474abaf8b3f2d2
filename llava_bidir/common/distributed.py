"""Collectives with which several processes compute what a single one does."""

import io
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import UserError

T = TypeVar("T")


def rank_count() -> int:
    """Return the number of processes of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Return the index of this process."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def all_gather(x: Tensor) -> Tensor:
    """Return the tensor of every process, f[R, ...], without gradient; f[1, ...] in a single process."""
    if rank_count() == 1:
        return x[None]
    tensors = [torch.empty_like(x) for _ in range(rank_count())]
    torch.distributed.all_gather(tensors, x.contiguous())
    return torch.stack(tensors)


def all_reduce(x: Tensor) -> Tensor:
    """Replace the tensor by its sum over processes, in place, and return it."""
    if rank_count() > 1:
        torch.distributed.all_reduce(x)
    return x


def broadcast(x: Any, source: int, device: torch.device | str = "cpu") -> Any:
    """Return the object of process `source`.

    Args:
        x: Object of this process, which may contain tensors.
        source: Process whose object it is.
        device: Where its tensors are put. Processes that see all GPUs would else find them on that of `source`.
    """
    if rank_count() == 1:
        return x
    file = io.BytesIO()
    if rank() == source:
        torch.save(x, file)
    box = [file.getvalue()]
    torch.distributed.broadcast_object_list(box, source)
    # our own processes' bytes, not a file that somebody gives us
    return torch.load(io.BytesIO(box[0]), map_location=device, weights_only=False)


def all_gather_objects(x: Any) -> list[Any]:
    """Return the object of every process."""
    if rank_count() == 1:
        return [x]
    parts: list[Any] = [None] * rank_count()
    torch.distributed.all_gather_object(parts, x)
    return parts


def gather_images(
    x: Tensor,
    images: list[int],
    owner: int,
    device: torch.device,
) -> Tensor | None:
    """Return the rows of all processes on process `owner`, on the CPU, and None on the others.

    Args:
        x: f[n, ...], the rows of this process.
        images: Number of rows of each process.
        owner: Process that needs them.
        device: Device of the collective; that of the model, as required by NCCL.
    """
    if rank_count() == 1:
        return x
    padded = x.new_zeros(max(images), *x.shape[1:])
    padded[: len(x)] = x
    padded = padded.to(device)
    parts = [torch.empty_like(padded) for _ in images] if rank() == owner else None
    torch.distributed.gather(padded, parts, owner)
    if parts is None:
        return None
    own = [part[:count].cpu() for part, count in zip(parts, images, strict=True)]
    return torch.cat(own)


def decide_on_first(function: Callable[[], T]) -> T:
    """Return the first process's `function()` on every process; its UserError is raised on every process."""
    result = None
    error = None
    if rank() == 0:
        try:
            result = function()
        except UserError as raised:
            error = str(raised)
    result, error = broadcast((result, error), 0)
    if error is not None:
        raise UserError(error)
    return result
