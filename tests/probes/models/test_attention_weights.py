"""Attention weights of the frozen model against transformers' own eager weights."""

import pytest
import tiny_models
import torch
from tolerances import assert_near
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import probes
from probes import Knockout

pytestmark = pytest.mark.numerics


@pytest.mark.parametrize("name", ["causal", "bidirectional", "prefix"])
def test_weights_equal_eager_attention(checkpoints, name):
    mllm = probes.load(checkpoints[name])
    pixels = tiny_models.pixels(2)
    stock = probes.load(checkpoints[name], attn_implementation="eager").model
    attentions = stock(mllm.ids.expand(2, -1), pixels, output_attentions=True).attentions
    eager = torch.stack(attentions)[..., -4:, -4:]  # L, B, A, T, T
    weights = mllm.attention(pixels, average_heads=False)
    assert list(weights) == ["layer_01", "layer_02", "layer_03"]
    assert_near(torch.stack([*weights.values()]), eager, 3)
    averaged = mllm.attention(pixels, ["layer_03", "layer_01"])
    assert list(averaged) == ["layer_03", "layer_01"]
    for site, of_layer in averaged.items():
        torch.testing.assert_close(of_layer, weights[site].mean(1))


def test_weights_follow_replaced_states(checkpoints):
    """A hook at a layer changes the attention of later layers, to what the replaced states have."""
    mllm = probes.load(checkpoints["causal"])
    pixels = tiny_models.pixels(2)
    swap = {"layer_01": lambda states: states.flip(0)}
    plain = mllm.attention(pixels)
    swapped = mllm.attention(pixels, hooks=swap)
    assert torch.equal(swapped["layer_01"], plain["layer_01"])
    for site in ("layer_02", "layer_03"):
        assert_near(swapped[site], plain[site].flip(0), 3)
        assert not torch.allclose(swapped[site], plain[site])


def test_weights_of_bf16_models_are_float32(checkpoints, monkeypatch):
    """From queries and keys in bf16; products in bf16 would be off by 1% and more."""
    mllm = probes.load(checkpoints["causal"], dtype="bfloat16")
    pixels = tiny_models.pixels(1)
    expected = []
    with torch.no_grad():
        for layer in mllm.decoder.layers:
            layer.self_attn.q_proj.weight *= 8  # attention that is not uniform
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, key, *args, **kwargs):
        if module in {layer.self_attn for layer in mllm.decoder.layers}:
            keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = query.double() @ keys.mT * kwargs["scaling"]
            logits = logits.masked_fill(~args[1], -torch.inf)
            expected.append(logits.softmax(-1)[0, :, -4:, -4:].float())
        return stock(module, query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attention)
        mllm.states(pixels)
    weights = torch.cat([*mllm.attention(pixels, average_heads=False).values()])
    assert_near(weights, torch.stack(expected), 1)


def test_knocked_out_tokens_receive_no_attention(checkpoints):
    """Other tokens of each image."""
    mllm = probes.load(checkpoints["bidirectional"])
    blocked = torch.tensor([[False, True, False, False], [True, False, False, True]])
    weights = mllm.attention(tiny_models.pixels(2), knockout=Knockout(blocked, layers=[2]))
    receives = [of_layer.any(1) for of_layer in weights.values()]
    assert receives[0].all() and receives[2].all()
    assert torch.equal(receives[1], ~blocked)
