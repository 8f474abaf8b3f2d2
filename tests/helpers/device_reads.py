"""What a GPU would make the host wait for, seen on a CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class DeviceReads(TorchDispatchMode):
    """Record operations whose result the host needs: on a GPU, it would wait for all work before them."""

    NAMES = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "masked_scatter_backward",
        "bincount",
        "equal",
        "unique",
    )

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        masked = name.startswith("index") and any(
            i is not None and i.dtype == torch.bool
            for a in args
            if isinstance(a, list | tuple)
            for i in a
        )
        if (
            name.startswith(self.NAMES)
            or masked
            or (name == "repeat_interleave" and not isinstance(args[1], int))
        ):
            self.reads.append(name)
        return function(*args, **kwargs or {})
