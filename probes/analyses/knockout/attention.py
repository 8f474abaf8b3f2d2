"""Attention of misclassified patches in the unmodified model: the observational counterpart of the knockout.

Shapes: B images, C cases, T image tokens, L layers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM


def attention_from(mllm: "FrozenMLLM", pixels: Tensor, queries: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the attention from some tokens of each image, averaged over these tokens and over heads.

    Args:
        mllm: The unmodified model.
        pixels: f[B, 3, H, W].
        queries: Per case the row of the image in `pixels` and the querying tokens, bool[T].

    Returns:
        Attention to each image token, f[C, L, T] (the remainder to 1 goes to the prefix), and the part of it that goes
        to the querying token itself, f[C, L].
    """
    weights = mllm.attention(pixels, queries=queries)
    to_all = [[layer.mean(0) for layer in case] for case in weights]
    to_itself = [
        [layer.gather(1, tokens.cpu().nonzero()).mean() for layer in case]
        for case, (_, tokens) in zip(weights, queries, strict=True)
    ]
    return torch.stack([torch.stack(case) for case in to_all]), torch.tensor(to_itself)


def sum_by_group(attention: Tensor, itself: Tensor, correct: Tensor, incorrect: Tensor) -> Tensor:
    """Sum attention by group of keys, f[L, 5] in the order of `GROUPS`; each row sums to 1.

    Args:
        attention: f[L, T], to each image token, mean over the querying tokens.
        itself: f[L], the part that goes to the querying token itself.
        correct: bool[T], other tokens predicted as the correct class.
        incorrect: bool[T], tokens predicted as the wrong class, all querying tokens among them.
    """
    to = lambda group: attention[:, group].sum(-1)
    groups = [itself, to(correct), to(incorrect) - itself, to(~(correct | incorrect)), 1 - attention.sum(-1)]
    return torch.stack(groups, -1)
