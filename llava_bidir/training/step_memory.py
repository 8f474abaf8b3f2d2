"""Memory of a GPU in a training step, of a model without weights.

The step runs on fake tensors of torch, which have shapes, dtypes and lifetimes, but no values: a 7B's takes seconds and
no memory. They are those of a device that holds all weights; what a strategy shards and gathers is computed from them.
Counted is what torch's allocator is asked for. A GPU holds more, some GB: the CUDA context, work space of kernels and
NCCL, and gaps between blocks.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.modeling_utils import local_torch_dtype

from llava_bidir.common.cli import Count
from llava_bidir.common.errors import UserError, error_context
from llava_bidir.data.collate import Batch

from .fsdp2_strategy import find_layers
from .module import LlavaTraining

ASSUMED_GPUS = 8  # of `trainer.devices: auto`, as LLaVA was trained
FP32 = 4  # bytes
LAYER = "a layer"
ZERO_DEFAULTS = {  # of DeepSpeed
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
    "overlap_comm": False,
}


class Sharding(Enum):
    """What divides a training among devices, by the name of its strategy; with the stage of ZeRO."""

    NONE = "SingleDeviceStrategy"
    DDP = "ddp"
    ZERO2 = "ZeRO2"
    ZERO3 = "ZeRO3"
    FSDP2 = "FSDP2"


@dataclass(frozen=True)
class Spread:
    """How a training is spread over devices.

    Args:
        devices: Number of GPUs, over all nodes.
        sharding: What they divide.
        precision: Lightning's name.
        zero: DeepSpeed's section `zero_optimization`.
    """

    devices: int
    sharding: Sharding = Sharding.NONE
    precision: str = "32-true"
    zero: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_zero(self) -> bool:
        """Return whether DeepSpeed trains, which computes in the dtype of the weights."""
        return self.sharding in (Sharding.ZERO2, Sharding.ZERO3)

    @property
    def is_half(self) -> bool:
        """Return whether products are in 16 bits."""
        return "16" in self.precision

    @property
    def autocasts(self) -> bool:
        """Return whether operations choose their dtype."""
        return self.is_half and "true" not in self.precision and not self.is_zero

    @property
    def stored_in(self) -> torch.dtype:
        """Return the dtype of weights between two steps."""
        if self.is_half and not self.autocasts:
            return torch.bfloat16
        return torch.float32

    @property
    def gathered_in(self) -> torch.dtype:
        """Return the dtype of weights in a forward, before autocast casts them."""
        if self.is_half and self.sharding is Sharding.FSDP2:
            return torch.bfloat16
        return self.stored_in


def read_spread(trainer: Namespace) -> Spread:
    """Return how the trainer of a config spreads a training; without a number of devices, over ASSUMED_GPUS.

    Raises:
        UserError: By a strategy of which the memory is not known, or over no devices.
    """
    devices = trainer.devices
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, list):
        devices = len(devices)
    if str(devices) in ("auto", "-1"):
        devices = ASSUMED_GPUS
    with error_context("trainer.devices and trainer.num_nodes"):
        devices = Count(devices) * Count(trainer.num_nodes)
    name = str(getattr(trainer.strategy, "class_path", trainer.strategy)).rpartition(".")[2]
    zero = {}
    if name == "ZeRO":
        zero = trainer.strategy.init_args.zero_optimization
        name += str(zero["stage"])
    elif name == "auto" and devices == 1:
        name = Sharding.NONE.value
    elif name == "auto":
        name = Sharding.DDP.value
    names = [sharding.value for sharding in Sharding]
    if name not in names:
        raise UserError(
            f"trainer.strategy: the memory under {name} is not known; known are {', '.join(names)}"
        )
    return Spread(devices, Sharding(name), str(trainer.precision or "32-true"), zero)


@dataclass(frozen=True)
class StepMemory:
    """Bytes by part, on a GPU when a step needs most, and on the host for each GPU where states are offloaded."""

    weights: float
    gradients: float
    optimizer: float
    activations: float = 0
    logits: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        """Return the bytes of the GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def step_memory(
    module: LlavaTraining, batch: Batch, spread: Spread, accumulates: bool
) -> StepMemory:
    """Return the memory of a step after the first one, which has made the optimizer's states.

    Args:
        module: The training, whose model becomes a fake one.
        batch: Micro-batch of the collation; only shapes are read.
        spread: Devices, precision and strategy.
        accumulates: Whether a step has several micro-batches.
    """
    build_fake(module, spread.gathered_in)
    on_one_device = run_step(module, batch, spread, accumulates)
    if spread.is_zero:
        return _under_zero(on_one_device, module.model, spread)
    if spread.sharding is Sharding.FSDP2:
        return _under_fsdp2(on_one_device, module, spread)
    if spread.sharding is Sharding.DDP:
        buckets = on_one_device.optimizer / 2
        return replace(on_one_device, gradients=on_one_device.gradients + buckets)
    return on_one_device


def _under_fsdp2(step: StepMemory, module: LlavaTraining, spread: Spread) -> StepMemory:
    """Return the memory under FSDP2 of what needs `step` on one device."""
    stored = sum(stored_bytes(p, module, spread) for p in module.model.parameters())
    sizes = [sum(map(_bytes, layer.parameters())) for layer in find_layers(module.model)]
    gathered = step.weights - sum(sizes) + 2 * max(sizes)  # one layer computes, the next one comes
    moments = 2 * FP32 * count_trained(module.model) / spread.devices
    return replace(step, weights=stored / spread.devices + gathered, optimizer=moments)


def _under_zero(step: StepMemory, model: nn.Module, spread: Spread) -> StepMemory:
    """Return the memory under ZeRO of what needs `step` on one device, or of the update if that needs more."""
    zero = {**ZERO_DEFAULTS, **spread.zero}
    size = spread.stored_in.itemsize
    shard = count_trained(model) / spread.devices
    optimizer = 3 * FP32 * shard  # masters and two moments
    sums = size * shard  # of the gradients
    updated = min(shard, zero["sub_group_size"])
    weights = step.weights
    gathered = 0.0
    buckets = size * zero["reduce_bucket_size"]
    host = 0.0
    if spread.sharding is Sharding.ZERO3:
        weights /= spread.devices
        largest = max(map(_bytes, model.parameters()))
        gathered = min(step.weights, max(largest, size * zero["stage3_max_live_parameters"]))
    elif zero["overlap_comm"]:
        buckets *= 2
    if "offload_param" in zero:
        host += weights
        weights = 0.0
    if "offload_optimizer" in zero:
        host += optimizer + sums + FP32 * shard
        optimizer = sums = updated = 0.0
    states = StepMemory(weights=weights, gradients=sums, optimizer=optimizer, host=host)
    # gradients are flattened, and converted
    update = replace(states, gradients=sums + (size + FP32) * updated)
    forward_backward = replace(
        states,
        weights=weights + gathered,
        gradients=sums + buckets,
        activations=step.activations,
        logits=step.logits,
    )
    return max(forward_backward, update, key=lambda memory: memory.total)


def stored_bytes(weight: nn.Parameter, module: LlavaTraining, spread: Spread) -> int:
    """Return the bytes of a weight between two steps, and in an export."""
    dtype = spread.stored_in
    if module.hparams.frozen_dtype == "bfloat16" and not weight.requires_grad:
        dtype = weight.dtype
    return weight.numel() * dtype.itemsize


def count_trained(part: nn.Module) -> int:
    """Return the number of weights that train."""
    return sum(p.numel() for p in part.parameters() if p.requires_grad)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def build_fake(module: LlavaTraining, dtype: torch.dtype) -> None:
    """Build the model of a training from configs alone, and replace its tensors by fake ones of the CPU."""
    with torch.device("meta"), local_torch_dtype(dtype):
        module.build(with_weights=False)
    fakes: dict[Tensor, Tensor] = {}  # tied weights have one
    with FakeTensorMode():
        for part in module.model.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = fakes.setdefault(tensor, _fake(tensor))
    module.on_fit_start()


def _fake(tensor: Tensor) -> Tensor:
    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, tensor.requires_grad)
    return fake


def run_step(module: LlavaTraining, batch: Batch, spread: Spread, accumulates: bool) -> StepMemory:
    """Return the memory of forward and backward on a device that holds all weights, and its share of gradients."""
    model = module.model
    trained = [p for p in model.parameters() if p.requires_grad]
    live = LiveTensors(vocabulary=len(model.lm_head.weight))
    autocast = nullcontext()
    if spread.autocasts:
        autocast = torch.autocast("cpu", torch.bfloat16)
    with trained[0].fake_mode as fake:
        inputs = tree_map_only(Tensor, fake.from_tensor, dict(batch))
        if spread.is_zero:
            inputs["pixel_values"] = inputs["pixel_values"].to(spread.stored_in)
        for tensor in (*model.parameters(), *model.buffers()):
            live.count(tensor, "weights")
        gradients = Gradients(model, live, spread)
        for parameter in trained:
            gradients.settle(parameter)  # of the micro-batch before
            parameter.register_post_accumulate_grad_hook(gradients.settle)
        gradients.held.pop(LAYER, None)
        with live:
            with autocast:
                loss = module.loss(inputs)
            if not accumulates:  # Lightning frees them after the forward
                model.zero_grad()
                gradients.held.clear()
            loss.backward()
    return StepMemory(**live.peak, optimizer=2.0 * sum(map(_bytes, trained)))


class LiveTensors(TorchDispatchMode):
    """Sum the bytes of tensors that live, by part, while a block makes some and drops others.

    Views count as what they are views of.

    Args:
        vocabulary: Tensors that the block makes are "logits" if they have so many columns, else "activations".

    Attributes:
        peak: Bytes by part when their sum was highest.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.live = Counter(weights=0, gradients=0, activations=0, logits=0)
        self.peak = Counter(self.live)
        self.part_of: dict[int, str] = {}  # a storage, by its address

    def __torch_dispatch__(
        self, operation: Callable, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and count what it returns unless it is a view or was changed in place."""
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.part_of:
                part = "activations"
                if tensor.shape[-1:] == (self.vocabulary,):
                    part = "logits"
                self.count(tensor, part)
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)
        return output

    def count(self, tensor: Tensor, part: str) -> None:
        """Count a tensor as of this part from now on, until it is freed."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if storage._cdata in self.part_of:
            self.live[self.part_of[storage._cdata]] -= size
        else:
            weakref.finalize(storage, self._release, storage._cdata, size)
        self.part_of[storage._cdata] = part
        self.live[part] += size

    def _release(self, address: int, size: int) -> None:
        self.live[self.part_of.pop(address)] -= size


class Gradients:
    """Gradients that a device has: all of them, or its shares, and under FSDP2 those of the layer that is reduced.

    Args:
        model: Fake model.
        live: Counts them.
        spread: What is sharded.
    """

    def __init__(self, model: nn.Module, live: LiveTensors, spread: Spread):
        self.live = live
        self.is_sharded = spread.sharding not in (Sharding.NONE, Sharding.DDP)
        self.share = spread.stored_in.itemsize / spread.devices
        self.held: dict[nn.Parameter | str, Tensor] = {}
        self.layers = []
        if spread.sharding is Sharding.FSDP2:
            self.layers = find_layers(model)
        self.in_layers = {p for layer in self.layers for p in layer.parameters()}
        # before and after the conversion for a sum
        self.copies = spread.gathered_in.itemsize + FP32

    def settle(self, parameter: nn.Parameter) -> None:
        """Count the gradient of a weight, and drop it where only a share is kept."""
        if not self.is_sharded:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            self.live.count(parameter.grad, "gradients")
            return
        parameter.grad = None
        self._hold(parameter, self.share * parameter.numel())
        if parameter in self.in_layers:
            self._hold(LAYER, self.copies * max(map(count_trained, self.layers)))

    def _hold(self, key: nn.Parameter | str, size: float) -> None:
        if key not in self.held:
            self.held[key] = torch.empty(math.ceil(size), dtype=torch.uint8)
            self.live.count(self.held[key], "gradients")
