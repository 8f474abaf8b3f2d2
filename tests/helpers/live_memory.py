"""The bytes of all tensors that live at once in a training, at most, as MemTracker of torch counts them.

Counted are storages, real ones of any kind of tensor: what DeepSpeed and FSDP2 keep, gather and free, too.
"""

import gc
import weakref
from collections.abc import Iterator
from unittest.mock import patch

import torch
from lightning import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tree) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in a tree, without those of the meta device, which have no memory."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, DTensor):
            leaf = leaf._local_tensor
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            yield leaf.untyped_storage()


def tensors_of_process() -> list[Tensor]:
    return [x for x in gc.get_objects() if issubclass(type(x), Tensor)]


class Meter(TorchDispatchMode):
    """Follows every storage that an operation takes or returns, and its size, until it is freed.

    `ignored`: addresses of storages that do not count.
    """

    def __init__(self, ignored=()):
        super().__init__()
        self.ignored = {*ignored}
        self.sizes = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        self.look((args, kwargs, output))
        return output

    def look(self, tree) -> None:
        for storage in storages(tree):
            self.follow(storage)

    def follow(self, storage) -> None:
        address = storage._cdata
        if address in self.ignored:
            return
        if address not in self.sizes:
            self.sizes[address] = 0
            weakref.finalize(storage, self.release, address)
        self.now += storage.nbytes() - self.sizes[address]
        self.sizes[address] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def release(self, address: int) -> None:
        self.now -= self.sizes.pop(address)

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_and_look(storage, size):
            resized = resize(storage, size)
            self.follow(storage)
            return resized

        # FSDP2 frees what it has gathered in this way
        self.patched = patch.object(torch.UntypedStorage, "resize_", resize_and_look)
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.patched.stop()


class PeakAfterFirstStep(Callback):
    """Measures the peak from the second step on, when the optimizer has its states; `tokens` are those of the run."""

    def __init__(self):
        self.before = tensors_of_process()  # held, so that no address of theirs is used again
        self.meter = None
        self.tokens = 0

    def on_train_batch_start(self, trainer, module, batch, *args):
        self.tokens += sum(batch["lengths"])
        if trainer.global_step > 0 and self.meter is None:
            ignored = {storage._cdata for storage in storages(self.before)}
            self.meter = Meter(ignored).__enter__()
            gc.collect()
            self.meter.look(tensors_of_process())

    def on_train_end(self, trainer, module):
        self.meter.__exit__(None, None, None)
