"""Attention knockout among image tokens (paper, Eq. 1).

A(t <- s) = -inf for all image tokens t and all s in B_c: no image token, those of B_c included, may attend to a
blocked one, while the blocked ones go on looking at all others. It is cut out of whatever mask the model runs under,
so padding, causality and text rows stay as they are.

Shapes: B batch, T image tokens, N tokens in all, Q of them, the last ones, as queries.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .masks import Masks, each


@dataclass(frozen=True)
class Knockout:
    """What is blocked and where.

    Args:
        blocked: bool[B, T], the image tokens that no image token may attend to (B_c of Eq. 1).
        layers: Decoder layers that are cut, numbered 1..L as in the sites' names; None cuts all, as the paper does.
    """

    blocked: Tensor
    layers: Sequence[int] | None = None

    def cut(self, mask: Tensor, is_image: Tensor) -> Tensor:
        """`mask` bool[B, 1, Q, N] (True = may attend) without the blocked columns in the rows of image tokens.

        `is_image` bool[N] says which tokens these are.

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
        tokens = int(is_image.sum())
        if self.blocked.dtype != torch.bool or self.blocked.shape != (mask.shape[0], tokens):
            raise ValueError(
                f"blocked must be bool[{mask.shape[0]}, {tokens}] (images, image tokens), got "
                f"{self.blocked.dtype} {list(self.blocked.shape)}"
            )
        queries = is_image[-mask.shape[-2] :]
        blocked = torch.zeros(mask.shape[0], mask.shape[-1], dtype=torch.bool, device=mask.device)
        blocked[:, is_image] = self.blocked.to(mask.device)
        cut = mask & ~(blocked[:, None, None, :] & queries[:, None])
        if not cut.any(-1).all():
            image, _, row = (~cut.any(-1)).nonzero()[0].tolist()
            token = int(queries[:row].sum())
            raise ValueError(
                f"blocking {int(self.blocked[image].sum())} tokens leaves image token {token} of image {image} in the "
                "batch nothing to attend to; keep a prefix before the image or block fewer tokens"
            )
        return cut

    @contextmanager
    def applied(self, layers: nn.ModuleList, masks: Masks, is_image: Tensor, depth: int) -> Iterator[None]:
        """Swaps the mask of the chosen layers' self-attention for the cut one while the context is open.

        Args:
            layers: The decoder's.
            masks: bool[B, 1, Q, N], what the model runs under, by kind of layer where there are several.
            is_image: bool[N], as in :meth:`cut`.
            depth: Layers that will run; a forward that wants early states stops there.

        Raises:
            ValueError: A layer is out of range.
            RuntimeError: A chosen layer ran without having its mask swapped: the knockout would be a no-op.
        """
        chosen = range(1, len(layers) + 1) if self.layers is None else self.layers
        for layer in chosen:
            if not 1 <= layer <= len(layers):
                raise ValueError(f"knockout layer {layer} is out of range; this model has layers 1..{len(layers)}")
        cuts, swapped = [(mask, self.cut(mask, is_image)) for mask in each(masks)], []

        def swap(layer: int, kwargs: dict) -> dict:
            given = kwargs.get("attention_mask")
            for mask, cut in cuts:
                if given is mask:
                    swapped.append(layer)
                    return {**kwargs, "attention_mask": cut}
            raise RuntimeError(f"layer {layer} attends under another mask than the one to cut: {given}")

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
