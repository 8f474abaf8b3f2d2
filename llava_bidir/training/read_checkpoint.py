"""The model of a training checkpoint, in memory."""

from pathlib import Path

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from transformers import LlavaProcessor

from llava_bidir.common.checkpoint_io import resolve_ckpt_path
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import error_context
from llava_bidir.model.lora import merge_lora
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

from .deepspeed_strategy import read_state, read_weights
from .module import LlavaTraining


def read_checkpoint(checkpoint: Path) -> tuple[LlavaBidirForConditionalGeneration, LlavaProcessor, dict]:
    """The model of a checkpoint of `llava-bidir fit`, with its processor and what is known of its run.

    Raises:
        UserError: It is none, or not as it was written.
    """
    if not checkpoint.exists():
        raise UserError(f"no checkpoint {checkpoint}; expected RUN/checkpoints/*.ckpt")
    resolve_ckpt_path(str(checkpoint), checkpoint.parent)
    if checkpoint.is_dir():
        saved = read_state(checkpoint) | {"state_dict": read_weights(checkpoint)}
    else:
        with error_context(f"checkpoint {checkpoint}"):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    settings = saved.get("hyper_parameters") if isinstance(saved, dict) else None
    if not isinstance(settings, dict) or "image_attention" not in settings or not saved.get("state_dict"):
        raise UserError(f"{checkpoint} is no checkpoint of `llava-bidir fit`")
    settings = {k: v for k, v in settings.items() if not k.startswith("_")}
    with error_context(f"the settings in {checkpoint}"):
        module = LlavaTraining(**settings | {"frozen_dtype": "float32"})
    with _DtypeContextManager(next(iter(saved["state_dict"].values())).dtype):  # frozen parts as they ran, too
        module.configure_model()
    module.on_load_checkpoint(saved)
    module.load_state_dict(saved["state_dict"], strict=False)
    return (
        merge_lora(module.model),
        module.processor,
        module.facts() | saved["progress"] | {"checkpoint": str(checkpoint)},
    )
