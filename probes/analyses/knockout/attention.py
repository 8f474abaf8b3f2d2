"""Attention that tokens pay in the unmodified model, by which controls of a knockout are matched.

Shapes: B images, C cases, T image tokens, L layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.models.attention_weights import read_attention
from probes.models.frozen_mllm import FrozenMLLM
from probes.models.sites import layer_site


def attention_from(
    mllm: FrozenMLLM, pixels: Tensor, queries: Sequence[tuple[int, Tensor]]
) -> Tensor:
    """Return the attention from some tokens of each image, averaged over these tokens and over heads.

    Args:
        pixels: f[B, 3, H, W].
        queries: Per case the row of the image in `pixels` and the querying tokens, bool[T].

    Returns:
        Attention to each image token, f[C, L, T]; the remainder to 1 goes to the prefix.
    """
    sites = [layer_site(i) for i in range(1, len(mllm.layers) + 1)]
    cases = read_attention(mllm, pixels, sites, queries)
    return torch.stack([torch.stack([case[site].mean(0) for site in sites]) for case in cases])
