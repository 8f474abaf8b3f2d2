"""Controls that show what the architecture does without training: parts of a model put back to before it."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import read_json

from .families import Family


def reinitialize(model: PreTrainedModel, family: Family, parts: Sequence[str], seed: int) -> None:
    """Draws the adapter as torch does (times the scale in training.json) and the LLM as transformers does.

    Args:
        model: Changed in place.
        family: Its entry.
        parts: "adapter", "llm".
        seed: Of the draws.

    Raises:
        UserError: An unknown part, or one that its own initialisation sets to zero.
    """
    decoder = family.decoder_of(model)
    modules = {"adapter": family.adapter_of(model), "llm": [decoder]}
    unknown = set(parts) - set(modules)
    if unknown:
        raise UserError(f"untrained knows {', '.join(modules)}, got {min(unknown)!r}")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            for module in (m for top in modules[part] for m in top.modules()):
                if part == "adapter" and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    _initialise(decoder if part == "llm" else model, module)
            _refuse_zeros(part, modules[part])
        training = Path(model.name_or_path) / "training.json"
        if "adapter" in parts and training.is_file():
            scale = read_json(training).get("adapter_init_scale", 1.0)
            if scale != 1.0:
                modules["adapter"][0].linear_2.weight *= scale


def _initialise(owner: PreTrainedModel, module: nn.Module) -> None:
    """As transformers draws it in a new model of this class."""
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False  # set on what came from a checkpoint, to keep it
    owner._init_weights(module)


def _refuse_zeros(part: str, modules: list[nn.Module]) -> None:
    for name, parameter in (pair for module in modules for pair in module.named_parameters()):
        if parameter.ndim > 1 and not parameter.any():
            raise UserError(
                f"untrained {part}: this model's own initialisation sets {name} to zero, which leaves nothing to probe"
            )
