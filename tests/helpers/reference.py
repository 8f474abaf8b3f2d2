"""Slow reference implementations, which share no code with the packages, and cases to compare them on."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255


def allowed(name: str, is_image: list[bool], q: int, k: int) -> bool:
    """Return True if query q may attend to key k in a sequence without padding."""
    causal = q >= k
    if name == "causal":
        return causal
    if name == "bidirectional":
        return (is_image[q] and is_image[k]) or causal
    if name == "prefix":
        last = max((i for i, x in enumerate(is_image) if x), default=-1)
        return (q <= last and k <= last) or causal
    raise ValueError(f"image_attention {name!r} has no definition in tests/helpers/reference.py")


def mask_by_loop(name: str, is_image: Tensor, padding: Tensor) -> Tensor:
    """Return the mask bool[B, N, N] by a loop over all pairs; rows and columns of padding are False."""
    batch, length = is_image.shape
    mask = torch.zeros(batch, length, length, dtype=torch.bool)
    for b in range(batch):
        real = [i for i in range(length) if padding[b, i]]
        flags = [bool(is_image[b, i]) for i in real]
        for qi, q in enumerate(real):
            for ki, k in enumerate(real):
                mask[b, q, k] = allowed(name, is_image=flags, q=qi, k=ki)
    return mask


def llama_states(decoder, inputs: Tensor, masks: list[Tensor], positions: Tensor) -> list[Tensor]:
    """Return the states of a Llama after each layer, with attention as a loop over heads and one mask per layer.

    Args:
        decoder: `LlamaModel`, used for its weights only.
        inputs: f[B, N, d].
        masks: One per layer, bool[B, N, N].
        positions: long[N].
    """
    config = decoder.config
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    width = config.hidden_size // heads
    angles = positions[:, None].float() / 10000.0 ** (torch.arange(0, width, 2) / width)
    cos = torch.cat([angles.cos()] * 2, -1)
    sin = torch.cat([angles.sin()] * 2, -1)

    def rotate(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1)
        return x * cos + half * sin

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x * (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()

    states = []
    x = inputs
    for layer, mask in zip(decoder.layers, masks, strict=True):
        a = layer.self_attn
        h = norm(x, layer.input_layernorm.weight)
        q = h @ a.q_proj.weight.T
        k = h @ a.k_proj.weight.T
        v = h @ a.v_proj.weight.T
        out = []
        for head in range(heads):
            shared = head * kv_heads // heads
            columns_of_head = slice(head * width, (head + 1) * width)
            kv = slice(shared * width, (shared + 1) * width)
            logits = (
                rotate(q[..., columns_of_head])
                @ rotate(k[..., kv]).transpose(1, 2)
                / math.sqrt(width)
            )
            out.append(logits.masked_fill(~mask, -math.inf).softmax(-1) @ v[..., kv])
        x = x + torch.cat(out, -1) @ a.o_proj.weight.T
        h = norm(x, layer.post_attention_layernorm.weight)
        m = layer.mlp
        x = x + (F.silu(h @ m.gate_proj.weight.T) * (h @ m.up_proj.weight.T)) @ m.down_proj.weight.T
        states.append(x)
    return states


def masks_by_layer(mllm, length: int, gone: Callable[[int, int, int], bool]) -> list[Tensor]:
    """Return the mask of each layer on prefix, image and text, bool[1, N, N], by a loop over pairs.

    Args:
        mllm: Its mask among image tokens is the one in :func:`allowed`.
        length: Number N of tokens.
        gone: Whether a layer, 1..L, lacks the pair of a query and a key.
    """
    first = mllm.prefix_ids.shape[1]
    tokens = mllm.grid[0] * mllm.grid[1]
    is_image = [first <= i < first + tokens for i in range(length)]
    masks = []
    for layer in range(1, len(mllm.decoder.layers) + 1):
        mask = torch.zeros(1, length, length, dtype=torch.bool)
        for q, k in itertools.product(range(length), repeat=2):
            mask[0, q, k] = allowed(mllm.image_attention, is_image=is_image, q=q, k=k) and not gone(
                layer, q, k
            )
        masks.append(mask)
    return masks


def uncached_states(mllm, pixels, text: list[int], masks: list[Tensor]) -> list[Tensor]:
    """Return the states of prefix, image and text after each layer, f[B, N, d], under one mask per layer."""
    embed = mllm.decoder.embed_tokens
    image = mllm.states(pixels, ["adapter"])["adapter"]
    parts = [embed(mllm.prefix_ids), image, embed(torch.tensor([text], dtype=torch.long))]
    inputs = torch.cat([part.expand(len(pixels), -1, -1) for part in parts], 1)
    return llama_states(
        mllm.decoder, inputs=inputs, masks=masks, positions=torch.arange(inputs.shape[1])
    )


def scores(predictions: list, targets: list, classes: int) -> tuple[float, float, list]:
    """Return mIoU, pixel accuracy and IoU per class (None for an absent class) of numpy masks; 255 is ignored."""
    intersection = [0] * classes
    union = [0] * classes
    right = total = 0
    for prediction, target in zip(predictions, targets, strict=True):
        valid = target != 255
        right += int(((prediction == target) & valid).sum())
        total += int(valid.sum())
        for k in range(classes):
            p = (prediction == k) & valid
            t = (target == k) & valid
            intersection[k] += int((p & t).sum())
            union[k] += int((p | t).sum())
    iou = [i / u if u else None for i, u in zip(intersection, union, strict=True)]
    defined = [x for x in iou if x is not None]
    return sum(defined) / len(defined), right / total, iou


def miou_of_counts(right, predicted, labelled, weights=None):
    """Return the mIoU of one site from counts [N, K] by numpy, or one for each row of weights [R, N]."""
    right, predicted, labelled = (np.asarray(x, dtype=float) for x in (right, predicted, labelled))
    weights = np.ones(len(labelled)) if weights is None else np.asarray(weights, dtype=float)
    intersection = weights @ right
    union = weights @ predicted + weights @ labelled - intersection
    iou = np.full(union.shape, np.nan)
    np.divide(intersection, union, out=iou, where=union > 0)
    return np.nanmean(iou, -1)


def make_case(shape, size, *, ignored=0.2, scale=3.0, seed=0, dtype=torch.float64):
    """Return random logits f[P, B, K, h, w] and labels i64[B, H, W], some of them ignored but never all."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(0, shape[2], (shape[1], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORED
    target[:, size[0] // 2, size[1] // 2] = 0
    return logits.to(dtype), target


def value_and_gradient(loss, logits, weights):
    """Return losses f[P] and the gradient of their weighted sum."""
    logits = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    losses = loss(logits)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    return losses.detach(), gradient
