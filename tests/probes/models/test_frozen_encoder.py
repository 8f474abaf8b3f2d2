"""Bare vision encoders: every site equals the stock model's hidden states; controls, knockout, other sides."""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import tiny_encoders
import torch
from layer_parts import LAYERS, check_parts, recorded
from PIL import Image

import probes
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from probes.models.families.encoders import ENCODERS
from probes.models.random_weights import layer_updates

assert_close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
VISION = [name for name, stock in tiny_encoders.STOCK.items() if not stock.two_towers]


def photo(seed: int = 0) -> Image.Image:
    """Return a random photo that is no square."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(255, size=(30, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the checkpoint of each kind of encoder."""
    root = tmp_path_factory.mktemp("encoders")
    return {name: stock.write(root / name) for name, stock in tiny_encoders.STOCK.items()}


def test_every_family_of_bare_encoders_has_a_stock_model_here():
    assert tiny_encoders.STOCK.keys() == ENCODERS.keys()


@pytest.mark.parametrize(
    ("name", "side"),
    [*product(tiny_encoders.STOCK, [24]), *product(VISION, [32])],  # positions interpolated
)
@torch.no_grad()
def test_sites_are_the_stock_models_hidden_states(name, side, folders):
    """Of two-tower checkpoints, too, which stock code reads as a vision model."""
    stock = tiny_encoders.STOCK[name]
    if stock.one_side and side != tiny_encoders.STORED_PX:
        with pytest.raises(UserError, match="takes 24 px only"):
            probes.load(folders[name], device="cpu", image_px=side)
        return
    encoder = probes.load(folders[name], device="cpu", image_px=side)
    pixels = encoder.preprocess([photo(), photo(1)])
    assert pixels.shape == (2, 3, side, side) and not encoder.has_llm
    square = np.asarray(photo().resize((side, side), Image.BICUBIC)) / 255
    normalised = (square - tiny_encoders.MEAN) / tiny_encoders.STD
    assert np.abs(pixels[0].permute(1, 2, 0).numpy() - normalised).max() < 1e-5
    states = encoder.states(pixels, "all_parts")
    model = load_weights("encoder", stock.cls, folders[name], dtype=torch.float32).eval()
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    attention = "attention" if hasattr(layers[0], "attention") else "self_attn"
    path = "attention.attention.value" if name == "data2vec-vision" else f"{attention}.v_proj"
    with recorded(layers, dict.fromkeys(LAYERS, path)) as found:
        output = model(**stock.inputs(pixels), output_hidden_states=True)
    grid = side // tiny_encoders.PATCH_PX
    assert encoder.grid == (grid, grid) and encoder.widths == dict.fromkeys(encoder.sites, 16)
    for i, hidden in enumerate(output.hidden_states):
        patches = hidden[:, stock.extra_tokens :]
        assert patches.shape[1] == grid * grid
        assert_close(states[f"layer_{i:02d}"], patches)
    names = ["layer_00", "layer_01", "layer_02", "layer_03"] + ["final_norm"] * stock.has_norm
    assert encoder.sites == names
    if stock.has_norm:
        last = output.last_hidden_state[:, stock.extra_tokens :]
        last = last if stock.normed else model.post_layernorm(last)  # CLIP norms its CLS token only
        assert_close(states["final_norm"], last)
    check_parts(
        states,
        recorded=found,
        depth=1,
        is_image=torch.arange(hidden.shape[1]) >= stock.extra_tokens,
    )


# of 16 px, which all of these are published with; of two sides, the shorter one is read
LARGER = {
    "vit": (64, None),
    "beit": (64, 80),
    "radio": (64, 80),
    "vit_mae": (64, None),
    "sapiens2": ([96, 64], None),
}


@pytest.mark.parametrize("name", LARGER)
@torch.no_grad()
def test_a_patch_of_16_px_changes_its_own_token_of_the_grid(name, tmp_path):
    stored, side = LARGER[name]
    stock = tiny_encoders.STOCK[name]
    settings = stock.settings | {"patch_size": 16, "image_size": stored}
    path = replace(stock, settings=settings).write(tmp_path)
    encoder = probes.load(path, device="cpu", image_px=side)
    cells = (side or 64) // 16
    assert encoder.grid == (cells, cells) and encoder.geometry.image_px == cells * 16
    pixels = encoder.preprocess(photo())
    plain = encoder.states(pixels, ["layer_00"])["layer_00"]
    for row, column in ((0, cells - 1), (2, 1)):
        changed = pixels.clone()
        changed[..., 16 * row :, 16 * column :][..., :16, :16] += 1
        states = encoder.states(changed, ["layer_00"])["layer_00"]
        difference = encoder.to_grid(states - plain)[0].norm(dim=-1)
        assert divmod(int(difference.argmax()), cells) == (row, column)


@pytest.mark.parametrize("name", VISION)
def test_random_layers_change_the_states_as_much_as_the_trained_ones(name, folders):
    """And are drawn again, each matrix: CLIP and SigLIP do it in the parent, where a flag would keep trained ones."""
    encoder = probes.load(folders[name], device="cpu")
    photos = [photo(seed) for seed in range(2)]
    pixels = encoder.preprocess(photos)
    trained = encoder.states(pixels, ["layer_00", "layer_01"])
    control = {"untrained": ["encoder"], "match": "update", "match_images": photos}
    random = probes.load(folders[name], device="cpu", **control)
    states = random.states(pixels)
    expected = pytest.approx(layer_updates(encoder, pixels), rel=2e-3)
    assert layer_updates(random, pixels) == expected
    assert torch.equal(states["layer_00"], trained["layer_00"])
    assert not torch.allclose(states["layer_01"], trained["layer_01"], atol=1e-2)
    pairs = zip(encoder.layers.named_parameters(), random.layers.parameters(), strict=True)
    assert [key for (key, a), b in pairs if a.ndim > 1 and torch.equal(a, b)] == []


@pytest.mark.parametrize(
    ("name", "backend"), [*product(VISION, ["sdpa"]), ("dinov2", "eager"), ("clip", "eager")]
)
@torch.no_grad()
def test_under_a_knockout_no_patch_reads_a_blocked_one(name, backend, folders):
    """Another state of the blocked patch before the cut layer changes no other patch behind it."""
    encoder = probes.load(folders[name], device="cpu", attn_implementation=backend)
    pixels = encoder.preprocess([photo()])
    blocked = (torch.arange(encoder.image_tokens) == 7)[None]
    noise = torch.randn(16, generator=torch.Generator().manual_seed(1))
    hooks = {"layer_01": lambda states: torch.where(blocked[..., None], noise, states)}
    cut = probes.Knockout(blocked, layers=[2])

    def states(knockout=None, **more):
        return encoder.states(pixels, ["layer_02"], knockout, **more)["layer_02"]

    if tiny_encoders.STOCK[name].has_own_attention:
        with pytest.raises(UserError, match="no attention that a knockout can cut"):
            states(cut)
        return
    # CLS and registers of this layer read the blocked patch, but patches of this layer do not read those of this layer
    assert (states(hooks=hooks) - states())[~blocked].abs().max() > 1e-4
    assert (states(cut, hooks=hooks) - states(cut))[~blocked].abs().max() <= 1e-6
    in_layers = torch.tensor([[False, True, False], [False, False, False]])
    by_row = probes.Knockout(blocked.expand(2, -1), in_layers)
    assert_close(states(by_row, rows=[0, 0]), torch.cat([states(cut), states()]))


@pytest.mark.parametrize("name", ["dinov2", "clip_vision_model", "beit"])
@torch.no_grad()
def test_attention_weights_are_those_of_eager_attention(name, folders):
    stock = tiny_encoders.STOCK[name]
    encoder = probes.load(folders[name], device="cpu")
    pixels = encoder.preprocess([photo()])
    weights = encoder.attention(pixels, ["layer_01", "layer_03"], average_heads=False)
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    eager = load_weights("encoder", reader=stock.cls, path=folders[name], **options).eval()
    expected = eager(**stock.inputs(pixels), output_attentions=True).attentions
    patches = slice(stock.extra_tokens, None)
    found = torch.cat([*weights.values()])
    expected = torch.cat(expected[::2])[:, :, patches, patches]
    assert_close(found, expected, rtol=1e-4)
