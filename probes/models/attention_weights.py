"""Attention weights of decoder layers, captured while the model runs.

Shapes: B images, T image tokens, A heads, q query tokens, N tokens, the last n of which run (the others are cached).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, inf, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llava_bidir.common.errors import UserError

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

    def attention(
        module,
        query,
        key,
        value,
        attention_mask,
        *args,
        scaling=None,
        **kwargs,
    ):
        if module in layer_of:
            recorded.append(module)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling

            def compute(image: int, queries: Tensor) -> Tensor:
                group = query.shape[1] // key.shape[1]  # query heads per key head
                rows = queries.to(query.device)
                keys = key[image].float().repeat_interleave(group, 0).transpose(1, 2)
                logits = query[image][:, rows].float() @ keys * scale
                if attention_mask is not None:
                    mask = attention_mask[image % len(attention_mask)][
                        :, rows
                    ]  # BEiT's has one for all
                    is_bias = mask.is_floating_point()
                    logits = logits + mask if is_bias else logits.masked_fill(~mask, -inf)
                return logits.softmax(-1)

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


def read_attention(
    mllm: nn.Module,
    pixels: Tensor,
    layers: Sequence[int],
    knockout: Knockout | None,
    queries: Sequence[tuple[int, Tensor]],
    average_heads: bool,
) -> list[Tensor]:
    """Return attention weights among image tokens; see :meth:`FrozenModel.attention`."""
    # from the end: prefix or not
    positions = mllm.is_image.cpu().nonzero().flatten() - len(mllm.is_image)
    weights: list[dict[int, Tensor]] = [{} for _ in queries]

    def record(layer: int, compute: Compute) -> None:
        for (image, tokens), by_layer in zip(queries, weights, strict=True):
            if layer in layers:
                heads = compute(image, positions[tokens.cpu()])
                by_layer[layer] = (heads.mean(0) if average_heads else heads).cpu()[..., positions]

    mllm.prefill_prefix()  # before the capture, which must not include it
    with capture_attention(mllm.layers, record):
        mllm.states(pixels, [layer_site(layer) for layer in layers], knockout)
    return [torch.stack([by_layer[layer] for layer in layers]) for by_layer in weights]
