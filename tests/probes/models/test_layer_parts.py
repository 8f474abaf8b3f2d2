"""Sites inside a layer: equal to what plain hooks on the stock forward say, or refused.

What attention adds is here the input of the norm before the MLP minus the input of the layer, so that no test reads the
module that the package reads.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from operator import attrgetter

import numpy as np
import pytest
import tiny_encoders
import tiny_families
import torch
from PIL import Image
from tiny_families import STOCK, pictures, stock_ids, stock_inputs
from tolerances import rounding

import probes
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from probes import Knockout

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

LAYERS = (1, 2, 3)
# where attention has been added, and the MLP not yet; other families: "post_attention_layernorm"
NORM_BEFORE_MLP = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "gemma4": "pre_feedforward_layernorm",
    "gemma4_unified": "pre_feedforward_layernorm",
    "exaone4_5": "mlp",  # no norm
    "lfm2_vl": "ffn_norm",
    "dinov2": "norm2",
    "dinov2_with_registers": "norm2",
    "dinov3_vit": "norm2",
    "aimv2_vision_model": "rms_norm2",
    **dict.fromkeys(("tipsv2", "tipsv2_vision_model", "radio", "sapiens2"), "norm2"),
    **dict.fromkeys(("vit", "ijepa", "deit", "vit_msn", "vit_mae"), "layernorm_after"),
    **dict.fromkeys(("beit", "data2vec-vision", "pixio"), "layernorm_after"),
}
PARALLEL = ("aya_vision", "cohere2_vision")  # attention and MLP read the same input
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


@contextmanager
def recorded(layers, norm: str, values: dict[int, str]):
    """Record by layer what the stock layers read and return; `values` are paths of modules by layer."""
    found = {}

    def keep(key, tensor):
        found[key] = (tensor[0] if isinstance(tensor, tuple) else tensor).clone()

    def entering(key):
        return lambda _, args, kwargs: keep(key, args[0] if args else kwargs["hidden_states"])

    def leaving(key):
        return lambda _, args, output: keep(key, output)

    handles = []

    def before(module, key):
        handles.append(module.register_forward_pre_hook(entering(key), with_kwargs=True))

    for i, layer in enumerate(layers, 1):
        before(layer, ("in", i))
        handles.append(layer.register_forward_hook(leaving(("out", i))))
        if norm:
            before(layer.get_submodule(norm), ("middle", i))
        else:
            handles.append(layer.self_attn.register_forward_hook(leaving(("attn", i))))
            handles.append(layer.mlp.register_forward_hook(leaving(("mlp", i))))
        if hasattr(layer, "per_layer_input_gate"):  # Gemma 4: after the MLP has been added
            before(layer.per_layer_input_gate, ("summed", i))
        if i in values:
            module = layer.get_submodule(values[i])
            handles.append(module.register_forward_hook(leaving(("value", i))))
    yield found
    for handle in handles:
        handle.remove()


def check_parts(
    states: dict[str, torch.Tensor],
    found: dict,
    depth: int,
    is_image: torch.Tensor,
    fused: bool = False,
):
    """Compare the states of all parts with what was recorded, relative to the states of the layer."""
    for layer in LAYERS:
        parts = {part: found[part, layer] for part in ("attn", "mlp") if (part, layer) in found}
        if ("middle", layer) in found:
            middle = found["middle", layer]
            parts["attn"] = middle - found["in", layer]
            parts["mlp"] = found.get(("summed", layer), found["out", layer]) - middle
        if ("value", layer) in found:
            value = found["value", layer].flatten(2)
            parts["value"] = value.chunk(4, -1)[3] if fused else value  # 4 heads q, 2 k, 2 v
        for part, of_all in parts.items():
            expected = of_all[:, is_image]
            large = found["out", layer] if part != "value" else expected
            tolerance = rounding(large, depth * layer)
            torch.testing.assert_close(states.pop(f"{part}_{layer:02d}"), expected, **tolerance)
            assert expected.abs().max() > 30 * tolerance["atol"]  # else zeros would pass
    assert not [site for site in states if site.startswith(("value_", "attn_", "mlp_"))]


# ------------------------------------------------------------------------------------------------ MLLMs
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
    norm = NORM_BEFORE_MLP.get(name, "post_attention_layernorm")
    layers = attrgetter(STOCK[stock].decoder)(frozen.model).layers
    with recorded(layers, "" if name in PARALLEL else norm, values) as found:
        frozen.model(use_cache=False, **stock_inputs(stock, pictures(stock)))
    _, is_image = stock_ids(stock)
    depth = 1 if STOCK[stock].masks else 1 + len(is_image) // 8  # as in test_families.py
    of_a_layer = 3 + (name in (*PARALLEL, "gemma4"))  # what is recorded, without values
    assert len(found) == 3 * of_a_layer + len(values)
    for site, state in states.items():
        assert state.shape == (2, frozen.image_tokens, frozen.widths[site])
    check_parts(states, found, depth, is_image, fused=name == "phi3")


@pytest.mark.parametrize("name", ["llava", "gemma4", "aya_vision", "qwen3_5", "lfm2_vl"])
def test_a_part_read_alone_is_the_same_and_the_forward_ends_there(name, load):
    frozen = load(name)
    pixels = frozen.preprocess(pictures(name, 1))
    together = frozen.states(pixels, "all_parts")
    has_values = 2 in VALUES.get(name, (LAYERS,))[0]
    sites = ["value_02"] * has_values + ["attn_02", "mlp_02", "layer_02"]
    ran = []
    layer = frozen.decoder.layers[1]
    mlp = layer.feed_forward if name == "lfm2_vl" else layer.mlp
    handle = mlp.register_forward_hook(lambda *_: ran.append("mlp"))
    for site in sites:
        alone = frozen.states(pixels, [site])
        assert torch.equal(alone[site], together[site])
        assert ran == ["mlp"] * (site in ("mlp_02", "layer_02"))
        ran.clear()
    handle.remove()


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_not_of_one_token_are_refused(name, load):
    frozen = load(name)
    pixels = frozen.preprocess(pictures(name, 1))
    layers, why = VALUES[name]
    with pytest.raises(UserError, match=f"^layer 1 has {why}; leave out value_01$"):
        frozen.states(pixels, ["value_01"])
    values = [site for site in frozen.states(pixels, "all_parts") if site.startswith("value_")]
    assert values == [f"value_{layer:02d}" for layer in layers]


def test_values_that_a_layer_takes_from_an_earlier_one_are_refused(tmp_path):
    """Gemma 4's last layers have no values of their own."""
    config = STOCK["gemma4"].config
    text = config["text_config"] | {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            STOCK,
            "gemma4",
            replace(STOCK["gemma4"], config=config | {"text_config": text}),
        )
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
    cut = frozen.states(pixels, "all_parts", Knockout(blocked, [2]), rows)
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


# ------------------------------------------------------------------------------------------------ bare encoders
@pytest.mark.parametrize(
    "name",
    [name for name, stock in tiny_encoders.STOCK.items() if not stock.two_towers],
)
@torch.no_grad()
def test_parts_of_a_bare_encoder_are_what_its_stock_layers_add(name, tmp_path):
    stock = tiny_encoders.STOCK[name]
    if name.startswith(("dino", "tipsv2", "radio", "sapiens")):  # layer scale
        stock = replace(stock, settings=stock.settings | {"layerscale_value": 0.5})
    encoder = probes.load(stock.write(tmp_path / name), device="cpu")
    noise = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3), np.uint8)
    pixels = encoder.preprocess([Image.fromarray(image) for image in noise])
    states = encoder.states(pixels, "all_parts")
    model = load_weights("encoder", stock.cls, tmp_path / name, dtype=torch.float32).eval()
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    norm = NORM_BEFORE_MLP.get(name, "layer_norm2")
    attention = "attention" if hasattr(layers[0], "attention") else "self_attn"
    path = "attention.attention.value" if name == "data2vec-vision" else f"{attention}.v_proj"
    values = dict.fromkeys(LAYERS, path)
    with recorded(layers, norm, values) as found:
        model(**stock.inputs(pixels))
    assert len(found) == 12
    assert torch.equal(encoder.states(pixels, ["attn_02"])["attn_02"], states["attn_02"])
    is_patch = torch.arange(found["in", 1].shape[1]) >= stock.extra_tokens
    check_parts(states, found, 1, is_patch)
