"""Attention of misclassified patches in the unmodified model: the observational counterpart of the knockout.

Shapes: B images, C cases, T image tokens, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.models.frozen_mllm import FrozenMLLM


def attention_from(
    mllm: FrozenMLLM, pixels: Tensor, queries: Sequence[tuple[int, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Return the attention from some tokens of each image, averaged over these tokens and over heads.

    Args:
        pixels: f[B, 3, H, W].
        queries: Per case the row of the image in `pixels` and the querying tokens, bool[T].

    Returns:
        Attention to each image token, f[C, L, T] (the remainder to 1 goes to the prefix), and the part of it that goes
        to the querying token itself, f[C, L].
    """
    to_all = []
    to_itself = []
    for case, (_, tokens) in zip(mllm.attention(pixels, queries=queries), queries, strict=True):
        to_all.append(torch.stack([layer.mean(0) for layer in case]))
        to_itself.append([layer.gather(1, tokens.cpu().nonzero()).mean() for layer in case])
    return torch.stack(to_all), torch.tensor(to_itself)


def sum_by_group(attention: Tensor, itself: Tensor, correct: Tensor, incorrect: Tensor) -> Tensor:
    """Sum attention f[L, T] and f[L] by group of keys, f[L, 5] in the order of `GROUPS`; each row sums to 1.

    `correct` and `incorrect` are the tokens predicted as these classes, bool[T]: all querying tokens are among the
    incorrect ones and none among the correct ones.
    """

    def to(group):
        return attention[:, group].sum(-1)

    groups = [
        itself,
        to(correct),
        to(incorrect) - itself,
        to(~(correct | incorrect)),
        1 - attention.sum(-1),
    ]
    return torch.stack(groups, -1)
