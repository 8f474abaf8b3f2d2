"""Reading of training checkpoints, files or ZeRO's, into a model in memory, for `llava-bidir export` and `fit`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaProcessor
from transformers.modeling_utils import local_torch_dtype

from llava_bidir.common.errors import UserError, error_context
from llava_bidir.common.runs import resolve_ckpt_path
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

from .deepspeed_strategy import load_zero_state, load_zero_weights
from .module import LlavaTraining


def read_checkpoint(
    checkpoint: Path,
) -> tuple[LlavaBidirForConditionalGeneration, LlavaProcessor, dict]:
    """Return model, processor, and settings and metrics of a checkpoint of `llava-bidir fit`.

    Raises:
        UserError: The checkpoint is missing, damaged, or not of `llava-bidir fit`.
    """
    if not checkpoint.exists():
        raise UserError(
            f"no checkpoint {checkpoint}; expected the folder of a run, whose newest checkpoint is taken, or "
            "RUN/checkpoints/*.ckpt"
        )
    resolve_ckpt_path(str(checkpoint), checkpoint.parent)  # raises if it is damaged
    if checkpoint.is_dir():
        saved = load_zero_state(checkpoint) | {"state_dict": load_zero_weights(checkpoint)}
    else:
        with error_context(f"checkpoint {checkpoint}"):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    settings = saved.get("hyper_parameters") if isinstance(saved, dict) else None
    if (
        not isinstance(settings, dict)
        or "image_attention" not in settings
        or not saved.get("state_dict")
    ):
        raise UserError(f"{checkpoint} is not a checkpoint of `llava-bidir fit`")
    module = rebuild(settings, saved, f"the settings in {checkpoint}")
    training = (
        module.settings()
        | saved["progress"]
        | {"identity": saved.get("identity"), "checkpoint": str(checkpoint)}
    )
    return module.model, module.processor, training


def rebuild(
    settings: Mapping[str, Any], saved: dict[str, Any], name: str = "the settings"
) -> LlavaTraining:
    """Return the module of a training with its trained weights; frozen ones are read from their source.

    Args:
        settings: Hyperparameters of the module.
        saved: Checkpoint, or its `state_dict` alone.
        name: What errors call the settings.

    Raises:
        UserError: The settings are not those of this class, or the weights not those of the settings.
    """
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    adapter = settings.get("adapter")
    # A trained adapter is in the checkpoint, so that the model of stage 1 may be gone.
    replaced = {"adapter": None if "adapter" in settings["trainable"] else adapter}
    with error_context(name):
        module = LlavaTraining(**settings | replaced)
    with local_torch_dtype(next(iter(saved["state_dict"].values())).dtype):
        module.configure_model()
    module.hparams["adapter"] = adapter
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"], strict=False)
    return module
