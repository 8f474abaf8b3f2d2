"""Attention weights of the frozen model against transformers' own eager weights."""

import pytest
import reference
import tiny_models
import torch
from tolerances import rounding
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import probes
from probes import Knockout

pytestmark = pytest.mark.numerics

QUERIES = [
    (0, torch.tensor([True, False, False, True])),
    (1, torch.tensor([False, True, True, True])),
]


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
def test_weights_equal_eager_attention(checkpoints, name):
    mllm = probes.load(str(checkpoints[name]))
    pixels = tiny_models.pixels(2)
    start = mllm.prefix_ids.shape[1]
    eager = torch.stack(reference.eager_attention(mllm, pixels), 1)[
        ..., start:, start:
    ]  # [B, L, A, T, T]
    for weights, (image, tokens) in zip(
        mllm.attention(pixels, queries=QUERIES), QUERIES, strict=True
    ):
        torch.testing.assert_close(weights, eager[image].mean(1)[:, tokens], **rounding(eager, 3))
    by_head = torch.stack(mllm.attention(pixels, layers=[3, 1], average_heads=False))
    torch.testing.assert_close(by_head, eager[:, [2, 0]], **rounding(eager, 3))


def test_weights_of_bf16_models_are_float32(checkpoints, monkeypatch):
    """From queries and keys in bf16; products in bf16 would be off by 1% and more."""
    mllm = probes.load(str(checkpoints["causal"]), dtype="bfloat16")
    pixels = tiny_models.pixels(1)
    expected = []
    with torch.no_grad():
        for layer in mllm.decoder.layers:
            layer.self_attn.q_proj.weight *= 8  # attention that is not uniform
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module,
        query,
        key,
        value,
        mask,
        *args,
        scaling,
        **kwargs,
    ):
        if module in {layer.self_attn for layer in mllm.decoder.layers}:
            keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = (query.double() @ keys.mT * scaling).masked_fill(~mask, -torch.inf)
            expected.append(logits.softmax(-1)[0, :, -4:, -4:].float())
        return stock(module, query, key, value, mask, *args, scaling=scaling, **kwargs)

    mllm.prefill_prefix()
    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
        mllm.states(pixels)
    (weights,) = mllm.attention(pixels, average_heads=False)
    torch.testing.assert_close(weights, torch.stack(expected), **rounding(weights, 1))


def test_knocked_out_tokens_receive_no_attention(checkpoints):
    mllm = probes.load(str(checkpoints["bidirectional"]))
    pixels = tiny_models.pixels(1)
    (weights,) = mllm.attention(
        pixels, knockout=Knockout(torch.tensor([[False, True, False, False]]), layers=[2])
    )
    assert weights[[0, 2], :, 1].all()
    assert not weights[1, :, 1].any()


def test_outputs_and_the_registry_do_not_change(checkpoints, monkeypatch):
    mllm = probes.load(str(checkpoints["causal"]))
    pixels = tiny_models.pixels(2)
    before = mllm.states(pixels)
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    mllm.attention(pixels, queries=QUERIES)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock
    assert all(torch.equal(before[site], state) for site, state in mllm.states(pixels).items())
    with pytest.raises(IndexError):
        mllm.attention(pixels, queries=[(2, QUERIES[0][1])])
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is stock, "also after an error"
    with pytest.raises(ValueError, match="unknown site 'layer_04'"):
        mllm.attention(pixels, [4])
    eager = probes.load(str(checkpoints["causal"]), attn_implementation="eager")
    with pytest.raises(ValueError, match="no attention weights were captured"):
        eager.attention(pixels)
