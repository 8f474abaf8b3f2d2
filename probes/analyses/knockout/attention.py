"""Where misclassified patches look in the unmodified model: the observational counterpart of the knockout.

Shapes: B images, C cases, T image tokens, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.models.frozen_mllm import FrozenMLLM

GROUPS = ("itself", "correct", "incorrect", "other", "no_image")


def attention_from(mllm: FrozenMLLM, pixels: Tensor, queries: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention that some tokens of each image pay, averaged over them and over heads.

    Args:
        mllm: Runs unmodified.
        pixels: f[B, 3, H, W].
        queries: By case, the image's row in `pixels` and which of its tokens look, bool[T].

    Returns:
        To each image token, f[C, L, T] (the rest, to 1, goes to what is no image); part of that, to itself, f[C, L].
    """
    weights = mllm.attention(pixels, queries=queries)
    to_all = [[layer.mean(0) for layer in case] for case in weights]
    to_itself = [
        [layer.gather(1, tokens.cpu().nonzero()).mean() for layer in case]
        for case, (_, tokens) in zip(weights, queries, strict=True)
    ]
    return torch.stack([torch.stack(case) for case in to_all]), torch.tensor(to_itself)


def by_group(attention: Tensor, itself: Tensor, correct: Tensor, incorrect: Tensor) -> Tensor:
    """Attention f[L, T], and of it to the token itself f[L], summed by group, f[L, 5], which sum to 1: the token
    itself, others predicted the correct class, others predicted the wrong one (bool[T] each), other image tokens, and
    what is no image. The tokens that look must all be in `incorrect`, and none in both.
    """
    to = lambda group: attention[:, group].sum(-1)
    groups = [itself, to(correct), to(incorrect) - itself, to(~(correct | incorrect)), 1 - attention.sum(-1)]
    return torch.stack(groups, -1)
