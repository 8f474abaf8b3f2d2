"""Attention weights of decoder layers, captured while the model runs.

Shapes: B images, T image tokens, A heads, q query tokens, N tokens, the last n of which run (the others are cached).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, inf, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_bidir.common.errors import UserError

from .families.modules import MODULE_TYPE
from .hooks import Change
from .knockout import Knockout
from .sites import layer_site

Compute = Callable[[int, Tensor], Tensor]


def softmax_attention(layer: nn.Module) -> nn.Module | None:
    """Return the attention of a layer of an LLM or of a vision encoder; None if it has linear attention only."""
    return getattr(layer, "self_attn", None) or getattr(layer, "attention", None)


@contextmanager
def capture_attention(
    layers: nn.ModuleList, record: Callable[[int, Compute], None]
) -> Iterator[None]:
    """Call record(layer 1..L, compute) for each decoder layer that runs while the context is open.

    `compute(image, queries)` returns the weights of some tokens of an image, f[A, q, N] in float32.

    Raises:
        UserError: A layer has linear attention, or none attended through transformers' sdpa interface.
    """
    attention_modules = [softmax_attention(layer) for layer in layers]
    if None in attention_modules:
        without = attention_modules.index(None) + 1
        raise UserError(
            f"attention cannot be read: layer {without} has linear attention, which has no weights"
        )
    layer_of = {module: i for i, module in enumerate(attention_modules, 1)}
    recorded = []
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        if module in layer_of:
            recorded.append(module)
            compute = partial(
                _weights_of_queries, query=query, key=key, mask=attention_mask, scaling=scaling
            )
            record(layer_of[module], compute)
        return stock(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = stock
    if not recorded:
        raise UserError(
            "no attention weights were captured; expected attn_implementation='sdpa' and a model that uses "
            "transformers' attention interface"
        )


def _weights_of_queries(
    image: int,
    queries: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """Return the weights f[A, q, N] of query tokens of an image, from what attention receives."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    group = query.shape[1] // key.shape[1]  # query heads per key head
    rows = queries.to(query.device)
    keys = key[image].float().repeat_interleave(group, 0).transpose(1, 2)
    logits = query[image][:, rows].float() @ keys * scaling
    if mask is not None:
        # BEiT's bias of relative positions is one for all images
        mask = mask.expand(len(query), -1, -1, -1)[image][:, rows]
        if mask.is_floating_point():
            logits = logits + mask
        else:
            logits = logits.masked_fill(~mask, -inf)
    return logits.softmax(-1)


def weights_of_image(heads: Tensor, positions: Tensor, average_heads: bool) -> Tensor:
    """Return the weights that image tokens receive, f[q, T], or f[A, q, T] by head, on the CPU.

    Args:
        heads: f[A, q, N], of `compute`.
        positions: i64[T], of the image tokens among all.
        average_heads: Whether weights are averaged over heads.
    """
    if average_heads:
        heads = heads.mean(0)
    return heads.cpu()[..., positions]


@torch.no_grad()
def read_attention(
    model: nn.Module,
    pixels: Tensor,
    sites: Sequence[str],
    queries: Sequence[tuple[int, Tensor]],
    knockout: Knockout | None = None,
    hooks: Mapping[str, Change] | None = None,
    average_heads: bool = True,
) -> list[dict[str, Tensor]]:
    """Return attention weights among image tokens by layer, computed for the requested query tokens only.

    Args:
        model: A :class:`FrozenModel`.
        pixels: f[B, 3, H, W].
        sites: Layers.
        queries: Pairs of the index of an image and its q query tokens bool[T].
        knockout: Attention knockout.
        hooks: Functions by site that replace the states of image tokens.
        average_heads: Whether weights are averaged over heads.

    Returns:
        {site: f[q, T]}, or f[A, q, T] by head, for each entry of `queries`: float32, on the CPU.

    Raises:
        UserError: The model is a module of no class of transformers.
    """
    if model.model.config.model_type == MODULE_TYPE:
        raise UserError(
            "attention is read of models of transformers; that of a module of your own is not known"
        )
    # from the end: prefix or not
    positions = model.is_image.cpu().nonzero().flatten() - len(model.is_image)
    weights: list[dict[str, Tensor]] = [{} for _ in queries]

    def record(layer: int, compute: Compute) -> None:
        site = layer_site(layer)
        if site not in sites:
            return
        for (image, tokens), by_site in zip(queries, weights, strict=True):
            heads = compute(image, positions[tokens.cpu()])
            by_site[site] = weights_of_image(heads, positions, average_heads)

    with capture_attention(model.layers, record):
        model.states(pixels, sites, knockout, hooks=hooks)
    return [{site: by_site[site] for site in sites} for by_site in weights]
