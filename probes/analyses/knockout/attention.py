"""Attention of misclassified patches in the unmodified model: the observational counterpart of the knockout.

Shapes: B images, C cases, T image tokens, N tokens in all, L layers, A heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from probes.models.frozen_mllm import FrozenMLLM, layer_site

GROUPS = ("itself", "correct", "incorrect", "other", "no_image")


@contextmanager
def observed(layers: nn.ModuleList, see: Callable[[int, Callable[[int, Tensor], Tensor]], None]) -> Iterator[None]:
    """Shows each decoder layer's attention while open: calls see(layer 1..L, weights).

    `weights(image, queries)` gives the attention of some of an image's tokens, f[A, q, N] in fp32; only what is asked
    for is computed, since all of it would be A x T x N an image. The model runs as ever.

    Raises:
        RuntimeError: The model's layers do not attend through transformers' interface, so nothing was seen.
    """
    number, seen = {layer.self_attn: i for i, layer in enumerate(layers, 1)}, []

    def attention(module, query, key, value, attention_mask, *args, scaling=None, **kwargs):
        if module in number:
            seen.append(number[module])
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling

            def weights(image: int, queries: Tensor) -> Tensor:
                shared = query.shape[1] // key.shape[1]  # query heads a key head, under grouped queries
                logits = query[image][:, queries] @ key[image].repeat_interleave(shared, 0).transpose(1, 2) * scale
                allowed = attention_mask[image][:, queries]
                return logits.float().masked_fill(~allowed, -torch.inf).softmax(-1)

            see(number[module], weights)
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention  # over the class's own entry, which stays
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not seen:
        raise RuntimeError("no attention was seen: this model does not attend through transformers' sdpa interface")


def attention_from(mllm: FrozenMLLM, pixels: Tensor, queries: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention that some tokens of each image pay, averaged over them and over heads.

    Args:
        mllm: Runs unmodified.
        pixels: f[B, 3, H, W].
        queries: By case, the image's row in `pixels` and which of its tokens look, bool[T].

    Returns:
        To each image token, f[C, L, T] (the rest, to 1, goes to what is no image); part of that, to itself, f[C, L].
    """
    layers, positions = mllm._decoder.layers, mllm.is_image.nonzero().flatten() - len(mllm.is_image)
    to_all: list[list[Tensor]] = [[] for _ in queries]
    to_itself: list[list[Tensor]] = [[] for _ in queries]

    def see(layer: int, weights: Callable[[int, Tensor], Tensor]) -> None:
        for case, (row, tokens) in enumerate(queries):
            looking = tokens.nonzero().flatten().to(mllm.device)
            paid = weights(row, positions[looking]).mean(0)[:, positions]  # from the end: a prefix may run along
            to_all[case].append(paid.mean(0).cpu())
            to_itself[case].append(paid.gather(1, looking[:, None]).mean().cpu())

    mllm.states(pixels[:1], [layer_site(1)])  # by now the prefix has run, which is not to be seen
    with observed(layers, see):
        mllm.states(pixels, [layer_site(len(layers))])
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
