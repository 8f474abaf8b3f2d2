"""ZeRO on processes of the CPU, where Lightning expects CUDA, and the complete weights of a sharded model."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from llava_bidir.model.build import no_zero3_partitioning
from llava_bidir.training.deepspeed_strategy import ZeRO


class ZeROOnCPU(ZeRO):
    """Private in Lightning: `_init_deepspeed_distributed`."""

    @property
    def root_device(self) -> torch.device:
        """The rank's device, with the index that DeepSpeed needs on the CPU too."""
        return torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """Skip Lightning's check for CUDA."""
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Start a process group of gloo."""
        reset_seed()
        self.set_world_ranks()
        # DeepSpeed would compile shared-memory communication on first use; gloo does not need it
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        self._init_deepspeed_distributed()


@contextmanager
def gather_parameters(model: nn.Module) -> Iterator[None]:
    """Gather parameters that ZeRO-3 partitioned, on every rank; all ranks must enter. A no-op for other models."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with no_zero3_partitioning(), GatheredParameters(partitioned):
        yield
