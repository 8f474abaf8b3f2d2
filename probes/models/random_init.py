"""Re-initialise parts of a model: controls that show what the architecture does without training."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.errors import UserError

from .families import Family


def reinitialize(model: PreTrainedModel, family: Family, parts: Sequence[str], seed: int) -> None:
    """Re-initialise "adapter" (as torch does, times the scale in training.json) or "llm" (as transformers does).

    Raises:
        UserError: A part is unknown, or its own initialisation sets a weight to zero.
    """
    decoder = family.decoder_of(model)
    modules = {"adapter": family.adapter_of(model), "llm": [decoder]}
    unknown = set(parts) - set(modules)
    if unknown:
        raise UserError(f"unknown part {min(unknown)!r} in untrained; expected {', '.join(modules)}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            for module in (m for top in modules[part] for m in top.modules()):
                if part == "adapter" and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    for parameter in module.parameters(recurse=False):
                        parameter._is_hf_initialized = False  # else transformers keeps weights from a checkpoint
                    (decoder if part == "llm" else model)._init_weights(module)
            for name, parameter in (pair for top in modules[part] for pair in top.named_parameters()):
                if parameter.ndim > 1 and not parameter.any():
                    raise UserError(
                        f"untrained {part}: the initialisation of this model sets {name} to zero, so that all states "
                        "would be equal; leave this part trained"
                    )
        training = Path(model.name_or_path) / "training.json"
        if "adapter" in parts and training.is_file():
            modules["adapter"][0].linear_2.weight *= read_json(training).get("adapter_init_scale", 1.0)
