"""DeepSpeed ZeRO for Lightning: 7B models on several GPUs.

Stage 2 shards optimizer state and gradients over the devices, stage 3 also the parameters. With precision bf16-mixed,
weights are bf16 with fp32 masters in the optimizer, as LLaVA trains.

Stage 3 also shards the frozen encoder. Replicating it would save 0.6 GB of communication per micro-batch (CLIP ViT-L in
bf16), compared to about 40 GB for the LLM's layers (7B, recomputed once), at 0.6 GB of memory per device. No rank may
skip the encoder: see the black image of Collate.

A run resumes on the same number of devices only.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import distributed_c10d
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.modeling_utils import local_torch_dtype

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import commit_directory, partial_path, read_json

TAG = "checkpoint"  # Lightning's name of the folder in a checkpoint directory
LAYOUT = "whole.json"  # beside it: how the checkpoint is sharded


class ZeRO(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy with DeepSpeed's option names; checkpoints hold trainable weights only.

    Private in Lightning: `_init_config_if_needed`, `_timeout`.

    Args:
        zero_optimization: DeepSpeed's section of that name. Numbers only: Lightning does not resolve "auto".
        timeout_minutes: Time that a rank waits for the others before the run fails.
        grad_accum_dtype: Dtype in which the gradients of a step's micro-batches are summed, by default that of the
            weights, bfloat16 as in LLaVA. fp32 costs 2 more bytes per trained weight, divided by the number of devices.
    """

    def __init__(
        self,
        zero_optimization: dict[str, Any],
        timeout_minutes: float = 30.0,
        grad_accum_dtype: Literal["fp32"] | None = None,
    ):
        super().__init__(
            config={
                # only logged; Lightning would open the data for it
                "train_micro_batch_size_per_gpu": 1,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the CPU
                "zero_optimization": dict(zero_optimization),
                "data_types": {"grad_accum_dtype": grad_accum_dtype},
            },
            timeout=timedelta(minutes=timeout_minutes),
            exclude_frozen_parameters=True,
        )

    def setup_environment(self) -> None:
        """Raise a UserError where there is no GPU."""
        try:
            super().setup_environment()
        except RuntimeError as error:
            if "only supported on CUDA GPUs" not in str(error):
                raise
            raise UserError(
                "trainer.strategy: ZeRO (-c zero2, zero3) needs a GPU, and there is none; leave it out for a trial"
            ) from None

    def setup(self, trainer: Trainer) -> None:
        """Set the timeout of all process groups: DeepSpeed creates its own with torch's default."""
        super().setup(trainer)
        for group in distributed_c10d._world.pg_map:  # private in torch, as is _set_pg_timeout
            distributed_c10d._set_pg_timeout(self._timeout, group)

    def teardown(self) -> None:
        """Switch partitioning off in transformers too."""
        unset_hf_deepspeed_config()
        super().teardown()

    # ------------------------------------------------------------------------- building
    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Let `from_pretrained` partition each tensor while it is read under ZeRO-3, until teardown.

        Rank 0 reads, and no rank ever holds the complete LLM. Lightning's own context would also partition models on
        the meta device, which have no data.
        """
        self._init_config_if_needed()
        # transformers keeps a weak reference
        self.transformers_config = HfDeepSpeedConfig(self.config)
        with local_torch_dtype(dtype_of(self.precision_plugin.precision)):
            yield
        for buffer in self.lightning_module.buffers():  # DeepSpeed moves parameters only
            buffer.data = buffer.data.to(self.root_device)

    def backward(self, closure_loss: torch.Tensor, optimizer, *args: Any, **kwargs: Any) -> None:
        """Run backward without DeepSpeed's division by the accumulated batches, since Lightning has done it."""
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # ------------------------------------------------------------------------- checkpoints
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None
    ) -> None:
        """Write each rank's shard into a temporary folder, which is renamed when all shards are on disk."""
        path = Path(self.broadcast(filepath))
        partial = partial_path(path)
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        super().save_checkpoint(checkpoint, str(partial), storage_options)  # ends with a barrier
        if self.is_global_zero:
            (partial / LAYOUT).write_text(json.dumps(self._layout(), indent=1) + "\n")
            commit_directory(path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of a ZeRO run.

        Raises:
            UserError: It was sharded for another number of devices, stage or precision.
        """
        path = Path(checkpoint_path)
        saved = read_json(path / LAYOUT)
        is_fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        if self.zero_stage_3 and not is_fitting:
            # DeepSpeed's loader needs the optimizer, which exists in training only; Lightning scatters from rank 0
            self.load_full_weights = True
            weights = dict.fromkeys(self.lightning_module.trainable_names())
            if self.is_global_zero:
                weights = load_zero_weights(path)
            return load_zero_state(path) | {"state_dict": weights}
        for key, ours in self._layout().items():
            if is_fitting and saved[key] != ours:
                raise UserError(
                    f"checkpoint {path} has {key} {saved[key]} and this run {ours}, so the optimizer's state does not "
                    f"fit. Resume with {key} {saved[key]}, or start from the weights alone, by `llava-bidir export`"
                )
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _layout(self) -> dict[str, Any]:
        """Return the settings that determine how the optimizer's state is sharded."""
        return {
            "world_size": self.world_size,
            "stage": self.config["zero_optimization"]["stage"],
            "precision": self.precision_plugin.precision,
        }


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype of a run's computations by Lightning's name of the precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float32


def load_zero_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the trained weights of a ZeRO checkpoint on the CPU, in the dtype of the run's computations.

    They are assembled from the fp32 masters of all ranks.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    dtype = dtype_of(read_json(path / LAYOUT)["precision"])
    weights = get_fp32_state_dict_from_zero_checkpoint(
        str(path), tag=TAG, exclude_frozen_parameters=True
    )
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def load_zero_state(path: Path) -> dict[str, Any]:
    """Return Lightning's part of a ZeRO checkpoint: settings, loops, callbacks, data."""
    from deepspeed.utils.zero_to_fp32 import get_model_state_file

    file = get_model_state_file(str(path / TAG), read_json(path / LAYOUT)["stage"])
    return torch.load(file, map_location="cpu", weights_only=True)
