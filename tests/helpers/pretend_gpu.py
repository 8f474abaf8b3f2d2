"""A GPU that computes on the CPU but keeps to a GPU's rules about where tensors are.

In `with pretend_gpu():`, tensors can be moved to "cuda"; in `with pretend_mps():`, to "mps", which has no float64. They
stay in CPU memory, and are remembered as being on the device. As on a real one, an operation on tensors of both devices
fails, and so does `numpy()`. The numbers are real, so that a whole command can be tested without a GPU. What the device
itself does is not tested: kernels, streams, memory, lower precision, synchronisation.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
aten = torch.ops.aten
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}


class Placement:
    """The storages that are on the pretended GPU."""

    def __init__(self):
        self.storages: dict[int, StorageWeakRef] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        while is_functorch_wrapped_tensor(tensor):  # in vmap
            tensor = get_unwrapped(tensor)
        reference = self.storages.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = StorageWeakRef(storage)
        return tensor


INIT_AUTOCAST = torch.autocast.__init__
PLACEMENT = Placement()  # for the whole process, since caches outlive a test


class CheckDevices(TorchDispatchMode):
    """Fail as a GPU does if an operation has tensors of both devices; results are where their arguments are."""

    def __init__(self, gpu: torch.device):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = [x in PLACEMENT for x in tensors]
        if not any(on_gpu):
            return func(*args, **kwargs)
        self._check(func, tensors, on_gpu)
        result = func(*args, **kwargs)
        if self.gpu.type == "mps" and func is not aten.copy_.default:
            check_has_dtype([x for x in tree_leaves((tensors, result)) if isinstance(x, Tensor)])
        return tree_map_only(Tensor, PLACEMENT.add, result)

    def _check(self, func, tensors: list[Tensor], on_gpu: list[bool]) -> None:
        allowed = func in INDEXING and on_gpu[0]  # CUDA takes indices from both devices
        if func is aten.copy_.default or allowed:
            return
        elsewhere = [
            x for x, there in zip(tensors, on_gpu, strict=True) if not there and x.ndim > 0
        ]
        if elsewhere:
            shapes = [list(x.shape) for x in elsewhere]
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device; {shapes} are on cpu, others on cuda"
            )


def check_has_dtype(tensors: list[Tensor]) -> None:
    """Fail as MPS does if a tensor there is float64."""
    if any(x.dtype == torch.float64 for x in tensors):
        raise TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
        )


class MoveTensors(TorchFunctionMode):
    """Move tensors to and from the pretended GPU, and answer where they are."""

    def __init__(self, gpu: torch.device):
        super().__init__()
        self.gpu = gpu
        self.getters = {
            Tensor.device.__get__: gpu,
            Tensor.is_cuda.__get__: gpu.type == "cuda",
            Tensor.is_cpu.__get__: False,
        }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" and func in self.getters:
            return self.getters[func] if args[0] in PLACEMENT else func(*args, **kwargs)
        if name in ("numpy", "__array__") and args[0] in PLACEMENT:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first"
            )
        if func in (Tensor.cpu, Tensor.cuda):
            return self._move(args[0], func is Tensor.cuda)
        if func is Tensor.to:
            return self._to(args, kwargs)
        if (
            func is F.one_hot and args[0] in PLACEMENT
        ):  # fills a tensor that C++ has made on the CPU
            return self._move(func(self._move(args[0], False), *args[1:], **kwargs), True)
        if func is Tensor.new_tensor and args[0] in PLACEMENT:
            return PLACEMENT.add(func(*args, **kwargs))
        if name == "get_device":
            return 0 if args[0] in PLACEMENT else -1
        return self._create(func, args, kwargs)

    def _move(self, x: Tensor, to_gpu: bool) -> Tensor:
        if (x in PLACEMENT) == to_gpu:
            return x
        if to_gpu and self.gpu.type == "mps":
            check_has_dtype([x])
        with torch._C.DisableTorchFunction():
            return _Copy.apply(x, to_gpu)

    def _to(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        x, *others = args
        device = kwargs.get("device")
        dtype = kwargs.get("dtype")
        for other in others:
            if isinstance(other, Tensor):
                device = self.gpu if other in PLACEMENT else CPU
                dtype = other.dtype
            elif isinstance(other, torch.dtype):
                dtype = other
            elif isinstance(other, (torch.device, str)):
                device = other
        to_gpu = None
        if device is not None and torch.device(device).type != "meta":
            to_gpu = torch.device(device).type == self.gpu.type
        if to_gpu is False:  # first: the CPU has more dtypes
            x = self._move(x, False)
        if dtype is not None:
            x = x.type(dtype)
        if to_gpu:
            x = self._move(x, True)
        return x

    def _create(self, func, args: tuple, kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        to_gpu = torch.device(device).type == self.gpu.type
        if to_gpu and kwargs.get("generator") is not None:  # all generators here are a CPU's
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if to_gpu:
            kwargs = kwargs | {"device": CPU}
        result = func(*args, **kwargs)
        if to_gpu and self.gpu.type == "mps":
            check_has_dtype([x for x in tree_leaves(result) if isinstance(x, Tensor)])
        return tree_map_only(Tensor, PLACEMENT.add, result) if to_gpu else result


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return _copy(x, to_gpu)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _copy(gradient, not ctx.to_gpu), None


def _copy(x: Tensor, to_gpu: bool) -> Tensor:
    with torch.utils._python_dispatch._disable_current_modes():
        copied = x.detach().clone()
    return PLACEMENT.add(copied) if to_gpu else copied


def _init_autocast(self, device_type: str, *args, **kwargs) -> None:
    """Cast as on a CPU, where the operations run."""
    INIT_AUTOCAST(self, device_type.replace("cuda", "cpu").replace("mps", "cpu"), *args, **kwargs)


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Pretend that the machine has one GPU of Nvidia's."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (10**11, 10**11),
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "manual_seed_all": lambda seed: None,
        "is_bf16_supported": lambda including_emulation=True: True,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch("probes.ops.kernels._installed", lambda: False))
        stack.enter_context(_pretend_device(torch.device("cuda", 0)))
        yield


@contextmanager
def pretend_mps() -> Iterator[None]:
    """Pretend that the machine is a Mac with a GPU of Apple's."""
    with (
        patch.object(torch.backends.mps, "is_available", lambda: True),
        patch("platform.processor", lambda: "arm"),
        _pretend_device(torch.device("mps", 0)),
    ):
        yield


@contextmanager
def _pretend_device(gpu: torch.device) -> Iterator[None]:
    """Move tensors to a device, and check where they are."""

    def run_backward(*args, **kwargs) -> Any:
        """Run a backward pass, which may call code of ours, with the mode that is off in `torch.autograd.grad`."""
        with MoveTensors(gpu):
            return _engine_run_backward(*args, **kwargs)

    with ExitStack() as stack:
        # Modes are of one thread
        stack.enter_context(patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"))
        # checkpoints note the device where the modes are off
        stack.enter_context(
            patch.dict(
                "torch.utils.checkpoint._allowed_determinism_checks_to_fns", default=lambda x: None
            )
        )
        stack.enter_context(patch.object(torch.autocast, "__init__", _init_autocast))
        stack.enter_context(patch("torch.autograd._engine_run_backward", run_backward))
        stack.enter_context(CheckDevices(gpu))
        stack.enter_context(MoveTensors(gpu))
        yield
