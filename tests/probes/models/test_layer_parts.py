"""Sites inside a layer of an MLLM: equal to what plain hooks on the stock forward say, or refused."""

from dataclasses import replace
from functools import cache
from operator import attrgetter

import pytest
import tiny_families
import torch
from layer_parts import LAYERS, check_parts, recorded
from tiny_families import STOCK, asked_ids, layer_depth, pictures, stock_inputs
from tolerances import rounding

import probes
from llava_bidir.common.errors import UserError
from probes import Knockout

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

# layers with values, of families that have others; and what is said of the first layer
VALUES = {
    "qwen3_5": ([2], "linear attention, which mixes values over tokens"),
    "qwen3_5_moe": ([2], "linear attention, which mixes values over tokens"),
    "lfm2_vl": ([2], "a convolution in place of attention"),
    "kimi_k25": (
        [],
        "latent attention, which expands values from one vector for all heads",
    ),
}
# other LLMs inside of LLaVA: fused projections, a multiplier, norms after the parts
LLMS = {
    "phi3": {},
    "granite": {"residual_multiplier": 0.25},
    "gemma2": {},
}


@pytest.fixture(scope="module")
def load(load_family, tmp_path_factory):
    """Return a function that loads a family, or LLaVA with another LLM, each once."""

    @cache
    def load_once(name: str):
        if name not in LLMS:
            return load_family(name)
        llava = STOCK["llava"]
        text = tiny_families.LLM | {"model_type": name} | LLMS[name]
        attention = "eager" if name == "gemma2" else "sdpa"  # which transformers lacks for it
        with pytest.MonkeyPatch.context() as patch:
            config = llava.config | {"text_config": text}
            patch.setitem(STOCK, "llava", replace(llava, config=config))
            folder = tiny_families.write("llava", tmp_path_factory.mktemp(name), attention)
        return probes.load(str(folder), device="cpu")

    return load_once


@pytest.mark.parametrize("name", [*STOCK, *LLMS])
@torch.no_grad()
def test_parts_are_what_layers_of_the_stock_forward_add(name, load):
    """Values are those of `v_proj`, in Gemma 4 after their norm, in Phi-3 the last quarter of the fused projection."""
    stock = "llava" if name in LLMS else name
    frozen = load(name)
    states = frozen.states(frozen.preprocess(pictures(stock)), "all_parts")
    path = {
        "gemma4": "self_attn.v_norm",
        "gemma4_unified": "self_attn.v_norm",
        "phi3": "self_attn.qkv_proj",
    }
    values = dict.fromkeys(LAYERS, path.get(name, "self_attn.v_proj"))
    if name in VALUES:
        values = {layer: values[layer] for layer in VALUES[name][0]}
    layers = attrgetter(STOCK[stock].decoder)(frozen.model).layers
    ids, is_image = asked_ids(stock)
    no_norm = "mlp" if name == "exaone4_5" else ""
    with recorded(layers, values, no_norm) as found:
        frozen.model(use_cache=False, **stock_inputs(stock, pictures(stock), ids))
    for site, state in states.items():
        assert state.shape == (2, frozen.image_tokens, frozen.widths[site])
    check_parts(
        states,
        found,
        layer_depth(stock),
        is_image,
        fused=name == "phi3",
    )


@pytest.mark.parametrize("name", ["llava", "gemma4", "aya_vision"])
def test_a_part_read_alone_is_the_same_and_the_forward_ends_there(name, load):
    frozen = load(name)
    pixels = frozen.preprocess(pictures(name, 1))
    together = frozen.states(pixels, "all_parts")
    ran = []
    with frozen.decoder.layers[1].mlp.register_forward_hook(lambda *_: ran.append("mlp")):
        for site in ("value_02", "attn_02", "mlp_02", "layer_02"):
            alone = frozen.states(pixels, [site])
            assert torch.equal(alone[site], together[site])
            assert ran == ["mlp"] * (site in ("mlp_02", "layer_02"))
            ran.clear()


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_not_of_one_token_are_refused(name, load):
    frozen = load(name)
    pixels = frozen.preprocess(pictures(name, 1))
    layers, why = VALUES[name]
    with pytest.raises(UserError, match=f"^layer 1 has {why}; leave out value_01$"):
        frozen.states(pixels, ["value_01"])
    values = [site for site in frozen.states(pixels, "all_parts") if site.startswith("value_")]
    assert values == [f"value_{layer:02d}" for layer in layers]


def test_values_that_a_layer_takes_from_an_earlier_one_are_refused(tmp_path, monkeypatch):
    """Gemma 4's last layers have no values of their own."""
    gemma4 = STOCK["gemma4"]
    text = gemma4.config["text_config"] | {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    config = gemma4.config | {"text_config": text}
    monkeypatch.setitem(STOCK, "gemma4", replace(gemma4, config=config))
    frozen = probes.load(str(tiny_families.write("gemma4", tmp_path)), device="cpu")
    pixels = frozen.preprocess(pictures("gemma4", 1))
    with pytest.raises(UserError, match="layer 3 has no values of its own, .*; leave out value_03"):
        frozen.states(pixels, ["value_03"])
    states = frozen.states(pixels, "all_parts")
    assert "value_03" not in states and {"value_02", "attn_03", "mlp_03"} < states.keys()


def test_rows_of_a_knockout_reach_parts_and_leave_encoder_layers(load):
    frozen = load("llava")
    pixels = frozen.preprocess(pictures("llava"))
    plain = frozen.states(pixels, "all_parts")
    blocked = torch.arange(36).expand(3, -1) % torch.tensor([[2], [3], [5]]) == 0
    rows = [1, 0, 1]
    cut = frozen.states(
        pixels,
        "all_parts",
        Knockout(blocked, [2]),
        rows,
    )
    for i, image in enumerate(rows):
        one = frozen.states(pixels[[image]], "all_parts", Knockout(blocked[[i]], [2]))
        for site, expected in one.items():
            torch.testing.assert_close(cut[site][[i]], expected, **rounding(expected, 3))
    for site in (
        *frozen.encoder_sites,
        "value_02",
    ):  # the knockout is in attention, after the values
        torch.testing.assert_close(cut[site], plain[site][rows])
    for site in ("attn_02", "mlp_02", "value_03"):
        assert not torch.allclose(cut[site], plain[site][rows], atol=1e-4)
