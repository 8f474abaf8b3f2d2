"""AdamW and the cosine schedule of LLaVA's two stages."""

import math

import torch
from torch import nn

from llava_bidir.model.build import TRAINABLE


def build_optimizer(
    model: nn.Module,
    learning_rates: dict[str, float],
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool,
) -> torch.optim.AdamW:
    """Return AdamW with one parameter group per trainable part.

    Args:
        model: Model whose `requires_grad` was set by :func:`llava_bidir.model.build.set_trainable`.
        learning_rates: Peak learning rate per part ("adapter", "llm").
        betas, weight_decay: Of AdamW. LLaVA uses no weight decay.
        fused: Use the fused kernel.
    """
    groups = []
    for part, rate in learning_rates.items():
        parameters = [
            p
            for n, p in model.named_parameters()
            if p.requires_grad and n.startswith(TRAINABLE[part])
        ]
        if parameters:
            groups.append(
                {
                    "params": parameters,
                    "lr": rate,
                    "name": part,
                }
            )
    return torch.optim.AdamW(
        groups,
        betas=betas,
        weight_decay=weight_decay,
        fused=fused,
    )


def build_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_ratio: float):
    """Return a linear warm-up, then a cosine to zero, over `steps` steps. Source: LLaVA scripts/v1_5/*.sh."""
    # which imports peft, and `verify-data` trains nothing
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * warmup_ratio), steps)
