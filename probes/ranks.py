"""What all processes of a run have to know of each other for several GPUs to train what one would."""

import torch
from torch import Tensor


def from_all_ranks(x: Tensor) -> Tensor:
    """A tensor of every process, f[R, ...]; of this one alone, f[1, ...], where there are no others. Without gradient."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return x[None]
    gathered = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, x.contiguous())
    return torch.stack(gathered)
