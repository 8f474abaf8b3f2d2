"""Layers that have learned nothing, in many ways: what each of them keeps of the trained ones, and what it has."""

from typing import get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from probes.world_options import RandomLLM
from probes.worlds.random_llms import FAMILIES, OF_LANGUAGE, matrices

CONFIG = {
    "vocab_size": 16,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**CONFIG)).requires_grad_(False).layers


def test_the_command_knows_all_of_them():
    assert list(FAMILIES) == list(get_args(RandomLLM))
    assert {*OF_LANGUAGE} < {*FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_two_draws_differ_and_one_seed_is_one_draw(name, layers):
    trained = {key: x.clone() for key, x in layers.state_dict().items()}
    drawn = []
    for seed in (1, 1, 2):
        layers.load_state_dict(trained)
        torch.manual_seed(seed)
        FAMILIES[name](layers)
        drawn.append(torch.cat([x.flatten() for x in layers.parameters()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], torch.cat([x.flatten() for x in trained.values()]))


@pytest.mark.parametrize("name", ["shuffled", "reordered", "exchanged"])
def test_these_have_the_trained_entries_in_other_places(name, layers):
    def entries():
        weights = torch.cat([x.flatten() for x in matrices(layers)])
        return weights.sort().values

    before = entries()
    FAMILIES[name](layers)
    assert torch.equal(entries(), before)


def test_an_exchanged_head_keeps_its_queries_keys_values_and_output(layers):
    def heads():
        attention = [layer.self_attn for layer in layers]
        rows = [
            torch.cat([getattr(a, f"{x}_proj").weight.unflatten(0, (4, 12)) for a in attention])
            for x in "qkv"
        ]
        columns = torch.cat([a.o_proj.weight.T.unflatten(0, (4, 12)) for a in attention])
        return {
            tuple(torch.cat([*parts]).flatten().tolist())
            for parts in zip(*rows, columns, strict=True)
        }

    before = heads()
    FAMILIES["exchanged"](layers)
    assert heads() == before


def test_spread_rank_and_attention_are_those_of_the_names(layers):
    def draw(name):
        FAMILIES[name](layers)
        return matrices(layers)

    for sd in (0.02, 0.32):
        assert all(abs(x.std() / sd - 1) < 0.1 for x in draw(f"normal_{sd}"))
    assert all(abs(x.std() / 0.08 - 1) < 0.1 for x in draw("uniform"))
    assert all(torch.linalg.matrix_rank(x) == 8 for x in draw("low_rank"))
    square = draw("orthogonal")[0]
    assert torch.allclose(square @ square.T, torch.eye(48), atol=1e-5)
    for name, factor in (("sharp", 4), ("flat", 0.05)):
        draw(name)
        attention = layers[1].self_attn
        assert abs(attention.q_proj.weight.std() / (0.08 * factor) - 1) < 0.1
        assert abs(attention.v_proj.weight.std() / 0.08 - 1) < 0.1
    draw("repeated")
    first, *others = (torch.cat([x.flatten() for x in layer.parameters()]) for layer in layers)
    assert all(torch.equal(first, other) for other in others)
    assert all((layer.input_layernorm.weight == 1).all() for layer in layers)
