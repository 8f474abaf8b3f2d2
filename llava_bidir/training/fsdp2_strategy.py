"""FSDP2, `torch.distributed.fsdp.fully_shard`, for Lightning: ZeRO-3 without DeepSpeed, on GPUs and on CPU processes.

Parameters, gradients and optimizer state are sharded over all devices. A unit is gathered when it computes, and
released afterwards: each layer of LLM and encoder is one, and the module of the training is the unit of the rest:
adapter, word embeddings, head and norms. Tied embeddings are thereby in one unit. With precision bf16-mixed, weights
are gathered in bf16 from sharded fp32 masters, and gradients are summed in fp32.

Checkpoints are the files of one process and DDP, so that a run also resumes without FSDP2: rank 0 writes complete
tensors, and needs host memory for weights and two moments, 82 GB for 6.8 billion weights; ZeRO writes shards. While the
model is built, each rank has all of it in host memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

# Methods of the module that compute with weights
FORWARD_METHODS = ("training_step", "validation_step", "test_step", "count_flops")


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, which shards the model after it is built.

    Private in Lightning: `_data_parallel_size`.

    Args:
        timeout_minutes: Time that a rank waits for the others before the run fails.
    """

    lightning_restore_optimizer = True  # as under DDP

    def __init__(self, timeout_minutes: float = 30.0):
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=timeout_minutes),
        )

    def setup_environment(self) -> None:
        """Set up one group of all devices: Lightning's "auto" is one device of each node."""
        self._data_parallel_size = self.world_size
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard the model that the block has built, unless it is."""
        yield
        if not isinstance(self.lightning_module, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            shard(self.lightning_module, mesh, self.precision_plugin.precision)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the complete trained weights, on rank 0."""
        trained = self.lightning_module.trainable_names()
        state = self.lightning_module.state_dict()
        return self._gather({name: state[name] for name in state if name in trained})

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the complete state of an optimizer, on rank 0."""
        return self._gather(optimizer.state_dict())

    def _gather(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a state with complete tensors in host memory on rank 0, an empty one on the others."""

        def gather(value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if not isinstance(value, Tensor):
                return value
            if self.is_global_zero:
                return value.cpu()
            return None

        gathered = tree_map(gather, state)
        if self.is_global_zero:
            return gathered
        return {}

    def load_checkpoint(self, checkpoint_path: str, **kwargs: Any) -> dict[str, Any]:
        """Map a checkpoint into memory, of which each rank reads its shards."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, mmap=True)

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load this rank's shards of the weights."""
        shards = self.lightning_module.state_dict()  # parameters may be gathered
        saved = checkpoint["state_dict"].items()
        state = {name: take_shard(tensor, shards[name]) for name, tensor in saved}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load this rank's shards of the optimizers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            shards = {
                i: {key: take_shard(value, parameters[i]) for key, value in moments.items()}
                for i, moments in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})


def shard(module: LightningModule, mesh: DeviceMesh, precision: str) -> None:
    """Shard a module whose `model` is a LLaVA over a mesh, in place; `generate` then ends when each rank has.

    Args:
        module: The training.
        mesh: Devices.
        precision: Lightning's name of the precision, which decides the dtype of gathered weights.
    """
    param_dtype = None
    if precision == "bf16-mixed":
        param_dtype = torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does so, and leaves the weight of a loss in fp32
    )
    for unit in find_layers(module.model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for name in FORWARD_METHODS:
        register_fsdp_forward_method(module, name)


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of encoder and LLM: the members of each list of modules that is not inside another one."""
    layers = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            layers += child
        else:
            layers += find_layers(child)
    return layers


def take_shard(value: Any, parameter: Tensor) -> Any:
    """Return this rank's shard of a complete tensor of a parameter; other values, such as a count of steps, as is."""
    if getattr(value, "shape", None) != parameter.shape:
        return value
    value = value.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # each rank has all of it
