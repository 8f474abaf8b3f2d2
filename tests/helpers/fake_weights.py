"""Models of any size without their weights: what is computed from weights has a shape only, ids and masks are real."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEXED_BY = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


class FakeWeights(TorchDispatchMode):
    """Run what touches a fake tensor in `fake`, and all else as it is.

    FakeTensorMode alone would make ids and masks fake, too, and with them each number of tokens that depends on one.
    Build the model in `fake`, and run it in this mode.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # a check of values, of which there are none
        if func in INDEXED_BY:
            args = (args[0], _numbers(args[1]), *args[2:])
        with self.fake:
            return func(*args, **kwargs)


def _numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Return indices with real masks replaced by the positions of their True values, so that the number is known."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = (
            index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        )
        numbers += index.nonzero().unbind(1) if is_mask else [index]
    return numbers
