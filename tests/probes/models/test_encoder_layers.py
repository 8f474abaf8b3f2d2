"""The encoder's own layers in an MLLM: equal to the hidden states of the stock vision tower, or refused."""

from contextlib import ExitStack

import pytest
import torch
from tiny_families import STOCK, pictures
from tolerances import rounding

from llava_bidir.common.errors import UserError

pytestmark = pytest.mark.usefixtures("small_squares")

# the vision tower of each family, its tokens before the patches, and the patches per side of an image token
TOWERS = {
    "llava": ("vision_tower", 1, 1),
    "vipllava": ("vision_tower", 1, 1),
    "llava_next": ("vision_tower", 1, 1),
    "llava_onevision": ("vision_tower", 0, 1),
    "deepseek_vl": ("vision_model", 0, 1),
    "janus": ("vision_model", 0, 1),
    "internvl": ("vision_tower", 1, 2),
    "qianfan_ocr": ("vision_tower", 1, 2),
    "lfm2_vl": ("vision_tower", 0, 2),
    "glm4v_moe": ("visual", 0, 2),
    "glm_ocr": ("visual", 0, 2),
    "video_llama_3": ("vision_model", 0, 1),
    "paddleocr_vl": ("visual", 0, 2),
    "kimi_k25": ("vision_tower", 0, 2),
    "idefics3": ("vision_model", 0, 3),
    "smolvlm": ("vision_model", 0, 3),
    "aya_vision": ("vision_tower", 0, 2),
    "cohere2_vision": ("vision_tower", 0, 2),
    "ovis2": ("vision_tower", 0, 2),
    "paligemma": ("vision_tower", 0, 1),
    "qwen2_vl": ("visual", 0, 2),
    "qwen3_vl": ("visual", 0, 2),
    "qwen3_vl_moe": ("visual", 0, 2),
    "qwen3_5": ("visual", 0, 2),
    "qwen3_5_moe": ("visual", 0, 2),
    "glm4v": ("visual", 0, 2),
    "glm46v": ("visual", 0, 2),
    "mistral3": ("vision_tower", 0, 2),
    "lighton_ocr": ("vision_encoder", 0, 2),
}
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
    found = []
    last = []
    module = frozen.model.get_submodule(f"model.{TOWERS[name][0]}")

    def ask(_, args, kwargs):
        return args, kwargs | {"output_hidden_states": True}

    with ExitStack() as stack:
        handle = module.register_forward_pre_hook(ask, with_kwargs=True)
        stack.callback(handle.remove)
        handle = module.register_forward_hook(lambda *x: found.extend(x[-1].hidden_states))
        stack.callback(handle.remove)
        if name in NORMED:
            norm = module.get_submodule(NORMED[name])
            handle = norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
            stack.callback(handle.remove)
        frozen.states(pixels, ["adapter"])  # the whole vision tower runs
    return [*found[:-1], *last] if last else found


def by_image_token(
    hidden,
    extra: int,
    merged: int,
    grid,
    by_token: bool,
) -> torch.Tensor:
    """Return the patches of each image token, one by one, concatenated."""
    rows, columns = grid
    order = torch.arange(rows * columns * merged**2)
    if not by_token:
        order = order.view(rows, merged, columns, merged).transpose(1, 2).flatten()
    return hidden[:, extra:][:, order].unflatten(1, (rows * columns, -1)).flatten(2)


def test_every_family_has_layers_of_its_encoder_or_a_reason():
    assert set(TOWERS) | set(REFUSED) == set(STOCK)


@pytest.mark.parametrize("name", TOWERS)
def test_encoder_layers_are_the_hidden_states_of_the_stock_vision_tower(name, load_family):
    tower, extra, merged = TOWERS[name]
    frozen = load_family(name)
    pixels = frozen.preprocess(pictures(name))
    stock = stock_hidden_states(frozen, name, pixels)
    sites = [f"encoder_{i:02d}" for i in range(len(stock))]
    assert frozen.encoder_sites == sites and len(sites) >= 3
    states = frozen.states(pixels, "all")
    assert list(states) == [*sites, *frozen.sites]
    patches = frozen.grid[0] * frozen.grid[1] * merged**2
    for site, hidden in zip(sites, stock, strict=True):
        hidden = hidden.reshape(2, extra + patches, -1)
        by_token = tower == "visual" and name != "paddleocr_vl"
        expected = by_image_token(hidden, extra, merged, frozen.grid, by_token)
        torch.testing.assert_close(states[site], expected, **rounding(expected, 1))
        assert states[site].shape == (2, patches // merged**2, frozen.widths[site])


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
