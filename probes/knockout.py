"""Attention knockout among image tokens (paper, Eq. 1).

A(t <- s) = -inf for all image tokens t and all s in B_c: no image token, those of B_c included, may attend to a
blocked one, while the blocked ones go on looking at all others. It is cut out of whatever mask the model runs under,
so padding, causality and text rows stay as they are.

Shapes: B batch, T image tokens, P tokens before the image, N = P + T.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Knockout:
    """What is blocked and where.

    Args:
        blocked: bool[B, T], the image tokens that no image token may attend to (B_c of Eq. 1).
        layers: Decoder layers that are cut, numbered 1..L as in the sites' names; None cuts all, as the paper does.
    """

    blocked: Tensor
    layers: Sequence[int] | None = None

    def cut(self, mask: Tensor) -> Tensor:
        """`mask` bool[B, 1, T, N] (True = may attend; rows are image tokens) without the blocked columns.

        With tokens p (prefix) and i (image), the second image token blocked, under a causal mask::

            i  1 1 0 0        i  1 1 0 0
            i  1 1 1 0   ->   i  1 1 0 0
            i  1 1 1 1        i  1 1 0 1

        Raises:
            ValueError: The mask is no boolean one, `blocked` does not fit it, or a row would be left without keys
                (the softmax over nothing spreads attention over all tokens, later ones included, or gives NaN).
        """
        if mask.dtype != torch.bool:
            raise ValueError(f"a knockout needs a boolean mask, got {mask.dtype}; run the model with sdpa attention")
        tokens = mask.shape[-2]
        if self.blocked.dtype != torch.bool or self.blocked.shape != (mask.shape[0], tokens):
            raise ValueError(
                f"blocked must be bool[{mask.shape[0]}, {tokens}] (images, image tokens), got "
                f"{self.blocked.dtype} {list(self.blocked.shape)}"
            )
        open_to_all = torch.zeros(mask.shape[0], mask.shape[-1] - tokens, dtype=torch.bool, device=mask.device)
        blocked = torch.cat([open_to_all, self.blocked.to(mask.device)], dim=1)
        cut = mask & ~blocked[:, None, None, :]
        if not cut.any(-1).all():
            image, _, token = (~cut.any(-1)).nonzero()[0].tolist()
            raise ValueError(
                f"blocking {int(self.blocked[image].sum())} tokens leaves image token {token} of image {image} in the "
                "batch nothing to attend to; keep a prefix before the image or block fewer tokens"
            )
        return cut

    @contextmanager
    def applied(self, layers: nn.ModuleList, mask: Tensor, depth: int) -> Iterator[None]:
        """Swaps the mask of the chosen layers' self-attention for the cut one while the context is open.

        Args:
            layers: The decoder's.
            mask: bool[B, 1, T, N], what the model runs under.
            depth: Layers that will run; a forward that wants early states stops there.

        Raises:
            ValueError: A layer is out of range.
            RuntimeError: A chosen layer ran without having its mask swapped: the knockout would be a no-op.
        """
        chosen = range(1, len(layers) + 1) if self.layers is None else self.layers
        for layer in chosen:
            if not 1 <= layer <= len(layers):
                raise ValueError(f"knockout layer {layer} is out of range; this model has layers 1..{len(layers)}")
        cut, swapped = self.cut(mask), []

        def swap(layer: int, kwargs: dict) -> dict:
            given = kwargs.get("attention_mask")
            if given is not mask:
                raise RuntimeError(f"layer {layer} attends under another mask than the one to cut: {given}")
            swapped.append(layer)
            return {**kwargs, "attention_mask": cut}

        handles = [
            layers[layer - 1].self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: (args, swap(layer, kwargs)), with_kwargs=True
            )
            for layer in chosen
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missed = {layer for layer in chosen if layer <= depth} - set(swapped)
        if missed:
            raise RuntimeError(f"the knockout did not reach layers {sorted(missed)}; their attention ran uncut")
