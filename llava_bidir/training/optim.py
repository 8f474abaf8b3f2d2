"""AdamW and the cosine schedule of LLaVA's two stages."""

import math

import torch
from torch import nn

from llava_bidir.model.trainable import part_of


def build_optimizer(
    model: nn.Module,
    learning_rates: dict[str, float],
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool,
) -> torch.optim.AdamW:
    """Return AdamW with one parameter group per trainable part, under weight decay two: biases and norms do not decay.

    Source: LLaVA llava_trainer.py create_optimizer.

    Deviates: of the encoder, CLS, registers and positions do not decay either. LLaVA-NeXT's create_optimizer decays
    them, but its scripts have no decay.

    Args:
        model: Model whose `requires_grad` was set by :func:`llava_bidir.model.trainable.set_trainable`.
        learning_rates: Peak learning rate per part ("encoder", "adapter", "llm").
        betas, weight_decay: Of AdamW. LLaVA's scripts use no weight decay.
        fused: Use the fused kernel.
    """
    groups = {}
    products = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 flattens parameters
        decays = len(shape) > 1
        if part == "encoder":
            decays = name in products
        decay = weight_decay * decays
        group = {
            "params": [],
            "lr": learning_rates[part],
            "name": part if decay == weight_decay else f"{part}_biases_and_norms",
            "weight_decay": decay,
        }
        groups.setdefault(group["name"], group)["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), betas=betas, fused=fused)


def build_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float):
    """Return a linear warm-up, then a cosine to zero, over `steps` steps. Source: LLaVA scripts/v1_5/*.sh."""
    # which imports peft, and `verify-data` trains nothing
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * warmup_ratio), steps)
