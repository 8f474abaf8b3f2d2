"""The encoder's own layers in an MLLM: equal to the hidden states of the stock vision tower, or refused."""

import math
from contextlib import ExitStack

import pytest
import torch
from tiny_families import STOCK, pictures
from tolerances import assert_near

from llava_bidir.common.errors import UserError

pytestmark = pytest.mark.usefixtures("small_squares")

# families whose last hidden states come after this norm, whose input is compared instead
NORMED = {
    "glm4v": "post_layernorm",
    "glm46v": "post_layernorm",
    "glm4v_moe": "post_layernorm",
    "glm_ocr": "post_layernorm",
    "video_llama_3": "post_layernorm",
    "kimi_k25": "final_layernorm",
    "paddleocr_vl": "vision_model.post_layernorm",
    "ovis2": "transformer.rms_norm",
}
REFUSED = {
    "deepseek_vl_hybrid": "has no encoder, or two without common layers",
    "gemma4_unified": "has no encoder, or two without common layers",
    "gemma3": "averages 2 x 2 patches for an image token: its encoder's grid is 6 x 6, .* tokens 3 x 3",
    "gemma4": "the layers of gemma4's encoder, gemma4_vision, cannot be read one by one",
    "exaone4_5": "orders its patches by windows of attention",
    "qwen2_5_vl": "orders its patches by windows of attention",
}


def stock_hidden_states(frozen, name: str, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Return the hidden states that the stock vision tower returns, in the order of its layers."""
    hidden_states = []
    last = []
    module = frozen.model.get_submodule(f"model.{frozen.family.vision_tower}")

    def ask(_, args, kwargs):
        return args, kwargs | {"output_hidden_states": True}

    with ExitStack() as stack:
        handle = module.register_forward_pre_hook(ask, with_kwargs=True)
        stack.callback(handle.remove)
        handle = module.register_forward_hook(lambda *x: hidden_states.extend(x[-1].hidden_states))
        stack.callback(handle.remove)
        if name in NORMED:
            norm = module.get_submodule(NORMED[name])
            handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
            stack.callback(handle.remove)
        frozen.states(pixels, ["adapter"])  # the whole vision tower runs
    return [*hidden_states[:-1], *last] if last else hidden_states


@pytest.mark.parametrize("name", sorted({*STOCK} - {*REFUSED}))
def test_encoder_layers_are_the_hidden_states_of_the_stock_vision_tower(name, load_family):
    frozen = load_family(name)
    pixels = frozen.preprocess(pictures(name))
    stock = stock_hidden_states(frozen, name, pixels)
    sites = [f"encoder_{i:02d}" for i in range(len(stock))]
    assert frozen.encoder_sites == sites and len(sites) >= 3
    states = frozen.states(pixels, "all")
    assert list(states) == [*sites, *frozen.sites]
    rows, columns = STOCK[name].grid
    for site, hidden in zip(sites, stock, strict=True):
        hidden = hidden.reshape(2, -1, hidden.shape[-1])
        merged = math.isqrt(hidden.shape[1] // (rows * columns))  # patches per side of a token
        order = torch.arange(rows * columns * merged**2)
        if not name.startswith(("qwen", "glm")):  # which order patches by their token
            order = order.view(rows, merged, columns, merged).transpose(1, 2).flatten()
        patches = hidden[:, hidden.shape[1] - len(order) :]  # without CLS
        expected = patches[:, order].unflatten(1, (rows * columns, -1)).flatten(2)
        assert_near(states[site], expected, 1)
        assert frozen.widths[site] == expected.shape[2]


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_layers_that_cannot_be_read_are_refused_with_the_reason(name, reason, load_family):
    frozen = load_family(name)
    pixels = frozen.preprocess(pictures(name))
    for sites in ("all", ["encoder_01", "adapter"]):
        with pytest.raises(
            UserError, match=f"{reason}.*; leave out sites that begin with encoder_"
        ):
            frozen.states(pixels, sites)
    assert [*frozen.states(pixels)] == frozen.sites == [*frozen.widths]
