"""Attention knockout among image tokens (paper, Eq. 1).

A(t <- s) = -inf for all image tokens t and all s in B_c: no image token, those of B_c included, may attend to a
blocked one, while the blocked ones go on looking at all others. It is cut out of whatever mask the model runs under,
so padding, causality and text rows stay as they are.

Beyond the paper, a cut can be confined to some layers and some heads, can differ by row of a batch, and can be reversed
(:meth:`Knockout.only`).

Shapes: B batch, T image tokens, N tokens in all, Q of them, the last ones, as queries, L layers, A attention heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llava_bidir.common.errors import UserError

from .attention_masks import Masks, each


@dataclass(frozen=True)
class Knockout:
    """What is blocked and where.

    Args:
        blocked: bool[B, T], the image tokens that no image token may attend to (B_c of Eq. 1); or bool[B, T, T], which
            token (second axis) may not attend to which (third).
        layers: Decoder layers that are cut, numbered 1..L as in the sites' names; None cuts all, as the paper does; a
            bool[B, L] says it for each row of the batch.
        heads: Query heads that are cut, numbered from 0; None cuts all; a bool[B, A] says it for each row.
    """

    blocked: Tensor
    layers: Sequence[int] | Tensor | None = None
    heads: Sequence[int] | Tensor | None = None

    @classmethod
    def only(cls, kept: Tensor, layers: Sequence[int] | Tensor | None = None) -> "Knockout":
        """The reverse: of the image, each token may attend to those `kept` bool[B, T] and to itself, and no others."""
        return cls(all_but(kept), layers)

    def cut(self, mask: Tensor, is_image: Tensor) -> Tensor:
        """`mask` bool[B, 1, Q, N] (True = may attend) without the blocked pairs of image tokens.

        With tokens p (prefix) and i (image), the second image token blocked, under a causal mask::

            i  1 1 0 0        i  1 1 0 0
            i  1 1 1 0   ->   i  1 1 0 0
            i  1 1 1 1        i  1 1 0 1

        Args:
            mask: See above; its rows are the last Q tokens, all image tokens among them.
            is_image: bool[N], which tokens these are.

        Raises:
            UserError: The mask is no boolean one, `blocked` does not fit it, or a row would be left without keys
                (the softmax over nothing spreads attention over all tokens, later ones included, or gives NaN).
        """
        if mask.dtype != torch.bool:  # eager attention would add a boolean mask to its logits, which blocks nothing
            raise UserError(f"a knockout needs a boolean mask, got {mask.dtype}; run the model with sdpa attention")
        images, tokens = mask.shape[0], int(is_image.sum())
        if self.blocked.dtype != torch.bool or self.blocked.shape not in (
            (images, tokens),
            (images, tokens, tokens),
        ):
            raise UserError(
                f"blocked must be bool[{images}, {tokens}] (images, image tokens) or, who may not attend to whom, "
                f"bool[{images}, {tokens}, {tokens}]; got {self.blocked.dtype} {list(self.blocked.shape)}"
            )
        blocked = self.blocked.to(mask.device)
        pairs = blocked[:, None, :] if blocked.ndim == 2 else blocked
        rows, columns = is_image[-mask.shape[-2] :].nonzero(), is_image.nonzero().flatten()
        cut = mask.clone()
        cut[:, 0, rows, columns] &= ~pairs
        left = cut[:, 0, rows.flatten()].any(-1)
        if not left.all():
            image, token = (~left).nonzero()[0].tolist()
            raise UserError(
                f"blocking {int(blocked[image].sum())} tokens leaves image token {token} of image {image} in the "
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
            UserError: A layer or head is out of range.
            RuntimeError: A chosen layer ran without having its mask swapped: the knockout would be a no-op.
        """
        images, swapped = len(each(masks)[0]), []
        chosen = _by_row(self.layers, images, len(layers), "layer", first=1).to(is_image.device)
        cuts = [(mask, self._in_heads(mask, self.cut(mask, is_image), layers)) for mask in each(masks)]

        def swap(layer: int, kwargs: dict) -> dict:
            given, rows = kwargs.get("attention_mask"), chosen[:, layer - 1]
            for mask, cut in cuts:
                if given is mask:
                    swapped.append(layer)
                    return {
                        **kwargs,
                        "attention_mask": cut if rows.all() else torch.where(rows[:, None, None, None], cut, mask),
                    }
            raise RuntimeError(f"layer {layer} attends under another mask than the one to cut: {given}")

        cut_layers = (chosen.any(0).nonzero().flatten() + 1).tolist()
        handles = [
            layers[layer - 1].self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, layer=layer: (args, swap(layer, kwargs)), with_kwargs=True
            )
            for layer in cut_layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        missed = {layer for layer in cut_layers if layer <= depth} - set(swapped)
        if missed:
            raise RuntimeError(f"the knockout did not reach layers {sorted(missed)}; their attention ran uncut")

    def _in_heads(self, mask: Tensor, cut: Tensor, layers: nn.ModuleList) -> Tensor:
        """`cut` in the chosen heads and `mask` in the others: bool[B, A, Q, N], or `cut` where all are chosen."""
        if self.heads is None:
            return cut
        heads = _by_row(self.heads, len(mask), layers[0].self_attn.config.num_attention_heads, "head", first=0)
        return torch.where(heads.to(mask.device)[:, :, None, None], cut, mask)


def all_but(kept: Tensor) -> Tensor:
    """bool[B, T, T], who may not attend to whom so that each token is left with those `kept` bool[B, T] and itself."""
    return ~(kept[:, None, :] | torch.eye(kept.shape[1], dtype=torch.bool, device=kept.device))


def _by_row(chosen: Sequence[int] | Tensor | None, rows: int, count: int, what: str, first: int) -> Tensor:
    """Which of `count` layers or heads, numbered from `first`, are cut in each row of the batch: bool[rows, count]."""
    if isinstance(chosen, Tensor):
        if chosen.dtype != torch.bool or chosen.shape != (rows, count):
            raise UserError(
                f"{what}s must be bool[{rows}, {count}] (images, {what}s), got {chosen.dtype} {list(chosen.shape)}"
            )
        return chosen
    if chosen is None:
        return torch.ones(rows, count, dtype=torch.bool)
    picked = torch.zeros(rows, count, dtype=torch.bool)
    for number in chosen:
        if not first <= number < first + count:
            raise UserError(
                f"knockout {what} {number} is out of range; this model has {what}s {first}..{first + count - 1}"
            )
        picked[:, number - first] = True
    return picked
