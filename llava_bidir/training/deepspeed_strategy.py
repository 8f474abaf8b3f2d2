"""DeepSpeed ZeRO for Lightning: 7B models over several GPUs, and the same code on CPU processes for tests.

Each device holds its share of the optimizer's state and gradients (stage 2), and of the parameters too (stage 3).
Weights are bf16 where the trainer's precision is bf16-mixed, with fp32 masters in the optimizer, as LLaVA trains.

Stage 3 shares out the frozen encoder too. Held whole it would save one transfer of 0.6 GB a micro-batch (CLIP ViT-L in
bf16), beside some 40 GB that the LLM's layers are sent in (7B, recomputed once), and it would cost as much memory on
every device. What ranks must not do is skip it: see LlavaTraining's black image.

A run goes on with as many devices as it had, or through DeepSpeed's ds_to_universal with any number.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from llava_bidir.common.atomic_io import partial_path, wrap_os_errors
from llava_bidir.common.checkpoint_io import commit_checkpoint_directory, read_manifest
from llava_bidir.common.errors import UserError
from llava_bidir.model.build import unpartitioned

TAG = "checkpoint"  # Lightning's name of the folder inside a checkpoint directory
UNIVERSAL = "zero"  # DeepSpeed's name of the folder of a universal checkpoint, one folder inside a parameter


class ZeRO(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with DeepSpeed's own words as options; checkpoints hold what trains.

    Args:
        zero_optimization: DeepSpeed's section of that name. Numbers only: Lightning resolves no "auto".
        timeout_minutes: How long a rank waits for the others before the run fails.

    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, zero_optimization: dict[str, Any], timeout_minutes: float = 30.0):
        if find_spec("deepspeed") is None:
            raise UserError("ZeRO needs DeepSpeed, which is not installed: pip install 'llava-bidir[cluster]'")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        super().__init__(
            config={
                "train_micro_batch_size_per_gpu": 1,  # goes to DeepSpeed's log; Lightning would open the data for it
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # offloaded, torch's fused AdamW runs on the CPU as well
                "zero_optimization": dict(zero_optimization),
            },
            timeout=timedelta(minutes=timeout_minutes),
            exclude_frozen_parameters=True,
        )

    # ------------------------------------------------------------------------- on CPU, where Lightning expects CUDA
    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device  # DeepSpeed asks for an index

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_environment()
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_distributed()
        reset_seed()
        self.set_world_ranks()
        # shared-memory communication would be compiled on first use; gloo does without
        import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        self._init_deepspeed_distributed()

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        for group in distributed_c10d._world.pg_map:  # DeepSpeed makes its groups without a timeout: torch's default
            distributed_c10d._set_pg_timeout(self._timeout, group)

    def teardown(self) -> None:
        unset_hf_deepspeed_config()
        super().teardown()

    # ------------------------------------------------------------------------- building
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """While this strategy lives, `from_pretrained` partitions each tensor as it is read under ZeRO-3: rank 0 reads,
        and no rank ever holds the LLM whole. Lightning's own context would partition all that is built inside of it,
        even the skeleton on the meta device, which has nothing to partition."""
        self._init_config_if_needed()
        self.transformers_config = HfDeepSpeedConfig(self.config)  # transformers keeps a weak reference
        bf16 = self.precision_plugin.precision.startswith("bf16")
        with _DtypeContextManager(torch.bfloat16 if bf16 else torch.float32):
            yield
        for buffer in self.lightning_module.buffers():  # DeepSpeed moves parameters
            buffer.data = buffer.data.to(self.root_device)

    def backward(self, closure_loss: torch.Tensor, optimizer, *args: Any, **kwargs: Any) -> None:
        """Lightning has divided the loss by the accumulated batches; DeepSpeed would do so again."""
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # ------------------------------------------------------------------------- checkpoints
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        """Every rank writes its share; the directory has its name only once all of it is on disk."""
        path = Path(self.broadcast(filepath))
        if self.is_global_zero:
            shutil.rmtree(partial_path(path), ignore_errors=True)
        with wrap_os_errors(path):
            super().save_checkpoint(checkpoint, str(partial_path(path)), storage_options)  # ends with a barrier
            if self.is_global_zero:
                commit_checkpoint_directory(path, {**self._layout(), "trained": sorted(self._trained())})
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str, weights_only: bool | None = None) -> dict[str, Any]:
        """
        Raises:
            UserError: It is not whole, trains other parameters, or is cut for another number of devices, another
                stage or another precision.
        """
        path = Path(checkpoint_path)
        if path.is_file():
            raise UserError(
                f"checkpoint {path} is a file, from a run without ZeRO; resume it without configs/cluster/zero*.yaml"
            )
        if (path / TAG / UNIVERSAL).is_dir():
            return self._load_universal(path)
        listing = read_manifest(path)
        self._check_trained(path, set(listing["trained"]))
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            self._check_layout(path, listing)
        elif self.zero_stage_3:  # where DeepSpeed expects the optimizer that only training has
            return self._load_weights(path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _load_universal(self, path: Path) -> dict[str, Any]:
        """A checkpoint that DeepSpeed's ds_to_universal made, for any number of devices."""
        self._check_trained(path, {folder.name for folder in (path / TAG / UNIVERSAL).iterdir() if folder.is_dir()})
        optimizer = self.deepspeed_engine.optimizer.optimizer
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.deepspeed_engine._config.load_universal_checkpoint = True
        state = super().load_checkpoint(str(path))
        # DeepSpeed gives all groups the settings of the first, and under ZeRO-3 one tensor to count their steps in,
        # which each of them then advances
        for group, own, rate in zip(
            optimizer.param_groups, settings, state["lr_schedulers"][0]["_last_lr"], strict=True
        ):
            group.update(own, lr=rate)
        for moments in optimizer.state.values():
            moments["step"] = moments["step"].clone()
        return state

    def _load_weights(self, path: Path) -> dict[str, Any]:
        """Rank 0 reads the weights and hands them out, one tensor at a time."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        weights = read_weights(path) if self.is_global_zero else {}
        for name, parameter in self.lightning_module.named_parameters():
            if parameter.requires_grad:
                with GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                    if self.is_global_zero:
                        parameter.copy_(weights.pop(name))
        return read_state(path)

    def _check_trained(self, path: Path, saved: set[str]) -> None:
        different = saved ^ self._trained()
        if different:
            raise UserError(
                f"checkpoint {path} and model.trainable differ in {len(different)} tensors, {min(different)} for one; it "
                "belongs to another stage or model"
            )

    def _layout(self) -> dict[str, Any]:
        """What decides how the optimizer's state is cut."""
        stage = self.config["zero_optimization"]["stage"]
        return {"world_size": self.world_size, "stage": stage, "precision": self.precision_plugin.precision}

    def _check_layout(self, path: Path, listing: dict[str, Any]) -> None:
        for key, ours in self._layout().items():
            if listing[key] != ours:
                way_out = f"go on from the weights alone: llava-bidir export {path} DIR"
                if key == "world_size":
                    way_out = (
                        "convert it for any number of devices: python -m deepspeed.checkpoint.ds_to_universal "
                        f"--inject_missing_state --input_folder {path / TAG} --output_folder NEW.ckpt/{TAG}, and "
                        "resume with --ckpt_path NEW.ckpt"
                    )
                raise UserError(
                    f"checkpoint {path} has {key} {listing[key]} and this run {ours}: the optimizer's state does not "
                    f"fit. Resume with {key} {listing[key]}, or {way_out}"
                )

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.lightning_module.named_parameters() if parameter.requires_grad}


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 partitioned are whole, on every rank; all ranks must enter. Does nothing to
    other models."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with unpartitioned(), GatheredParameters(partitioned):
        yield


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """What a ZeRO checkpoint trained, put together on the CPU from the fp32 masters of all ranks, in the dtype that the
    run computed with.

    Raises:
        UserError: The checkpoint is not whole.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    dtype = torch.bfloat16 if read_manifest(path)["precision"].startswith("bf16") else torch.float32
    weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG, exclude_frozen_parameters=True)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def read_state(path: Path) -> dict[str, Any]:
    """Lightning's part of a ZeRO checkpoint: settings, loops, callbacks, data."""
    from deepspeed.utils.zero_to_fp32 import get_model_state_file

    file = get_model_state_file(str(path / TAG), read_manifest(path)["stage"])
    state = torch.load(file, map_location="cpu", weights_only=True)
    return {key: value for key, value in state.items() if key != "module"}
