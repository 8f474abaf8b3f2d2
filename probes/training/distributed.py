"""What all processes of a run have to know of each other for several GPUs to train what one would."""

import torch
from torch import Tensor


def rank_count() -> int:
    """Processes of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """A tensor of every process, f[R, ...], without gradient; f[1, ...] where there is but one."""
    if rank_count() == 1:
        return x[None]
    gathered = [torch.empty_like(x) for _ in range(rank_count())]
    torch.distributed.all_gather(gathered, x.contiguous())
    return torch.stack(gathered)
