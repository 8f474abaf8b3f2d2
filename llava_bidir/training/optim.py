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
    """Return AdamW with one parameter group per trainable part, under weight decay two: biases and norms do not decay.

    Source: LLaVA llava_trainer.py create_optimizer.

    Args:
        model: Model whose `requires_grad` was set by :func:`llava_bidir.model.build.set_trainable`.
        learning_rates: Peak learning rate per part ("adapter", "llm").
        betas, weight_decay: Of AdamW. LLaVA's scripts use no weight decay.
        fused: Use the fused kernel.
    """
    groups = []
    for part, rate in learning_rates.items():
        parameters = [
            p
            for n, p in model.named_parameters()
            if p.requires_grad and n.startswith(TRAINABLE[part])
        ]
        for name, decay, members in _decay_groups(part, parameters, weight_decay):
            groups.append(
                {
                    "params": members,
                    "lr": rate,
                    "name": name,
                    "weight_decay": decay,
                }
            )
    return torch.optim.AdamW(
        groups,
        betas=betas,
        fused=fused,
    )


def _decay_groups(
    part: str,
    parameters: list[nn.Parameter],
    weight_decay: float,
) -> list[tuple[str, float, list[nn.Parameter]]]:
    """Return name, weight decay and parameters of the groups of a part that have any."""
    if weight_decay == 0:
        groups = [(part, 0.0, parameters)]
    else:
        matrices = [p for p in parameters if _is_matrix(p)]
        others = [p for p in parameters if not _is_matrix(p)]
        groups = [(part, weight_decay, matrices), (f"{part}_biases_and_norms", 0.0, others)]
    return [group for group in groups if group[2]]


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Return False for biases and weights of norms, also under ZeRO-3, which flattens all."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


def build_schedule(
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup_ratio: float,
):
    """Return a linear warm-up, then a cosine to zero, over `steps` steps. Source: LLaVA scripts/v1_5/*.sh."""
    # which imports peft, and `verify-data` trains nothing
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * warmup_ratio), steps)
