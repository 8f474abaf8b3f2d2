"""Reading of training checkpoints, files or ZeRO's folders, into a model in memory, and their export."""

from contextlib import chdir
from pathlib import Path

import torch
from transformers import LlavaProcessor
from transformers.modeling_utils import local_torch_dtype

from llava_bidir.common.errors import error_context
from llava_bidir.model.export import export_hf
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

from .deepspeed_strategy import load_zero_state, load_zero_weights
from .module import LlavaTraining


def export_checkpoint(checkpoint: Path, out: Path) -> None:
    """Export the model of a checkpoint to a folder; see :func:`read_checkpoint`."""
    model, processor, training = read_checkpoint(checkpoint)
    export_hf(model, processor=processor, out=out, training=training)


def read_checkpoint(
    checkpoint: Path,
) -> tuple[LlavaBidirForConditionalGeneration, LlavaProcessor, dict]:
    """Return model, processor, and settings and metrics of a checkpoint of `llava-bidir fit`.

    Frozen weights are read from their source, whose path begins at the folder of the training if it is relative.

    Raises:
        UserError: The checkpoint is damaged, or not of `llava-bidir fit`; or its settings are not those of this
            version, or its weights not those of the settings.
    """
    with error_context(f"checkpoint {checkpoint}"):
        if checkpoint.is_dir():
            saved = load_zero_state(checkpoint) | {"state_dict": load_zero_weights(checkpoint)}
        else:
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        settings = {k: v for k, v in saved["hyper_parameters"].items() if k[0] != "_"}
        adapter = settings["adapter"]
        needed = adapter
        if "adapter" in settings["trainable"]:
            needed = None  # it is in the checkpoint, so that the model of stage 1 may be gone
        folder = Path(saved.get("folder", "."))
        if not folder.is_dir():  # of another machine
            folder = Path()
        dtype = next(iter(saved["state_dict"].values())).dtype
        with chdir(folder), local_torch_dtype(dtype):
            module = LlavaTraining(**settings | {"adapter": needed})
            module.configure_model()
        module.hparams["adapter"] = adapter
        module.on_load_checkpoint(saved)
        module.load_state_dict(saved["state_dict"], strict=False)
    training = module.settings() | saved["progress"] | {"identity": saved["identity"]}
    return module.model, module.processor, training
