"""Every family on a tiny random instance of its real class, against plain hooks on the forward of that class."""

import shutil
from copy import copy, deepcopy
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
from layer_parts import LAYERS, check_parts, recorded
from tiny_families import (
    SEVERAL_WAYS_IN,
    SIDE,
    STOCK,
    WORDS,
    asked_ids,
    layer_depth,
    pictures,
    stock_inputs,
    write,
)
from tolerances import assert_near, rounding

import probes
from llava_bidir.common.errors import UserError
from probes import Knockout
from probes.models.families import FAMILIES
from probes.models.random_weights import layer_updates

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

ALL = sorted(STOCK)
MASKABLE = [name for name in ALL if STOCK[name].masks]
# other LLMs inside of LLaVA: fused projections, a multiplier, norms after the parts; backends that transformers has
LLMS = {
    "phi3": ("sdpa", {}),
    "granite": ("sdpa", {"residual_multiplier": 0.25}),
    "gemma2": ("eager", {"final_logit_softcapping": None}),  # LLaVA's forward has no cap
}
VALUE_PATHS = {
    "gemma4": "self_attn.v_norm",
    "gemma4_unified": "self_attn.v_norm",
    "phi3": "self_attn.qkv_proj",
}
# layers with values, of families that have others; and what is said of the first layer
VALUES = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), ([2], "linear attention, which mixes values .*")),
    "lfm2_vl": ([2], "a convolution in place of attention"),
    "kimi_k25": ([], "latent attention, which expands values from one vector for all heads"),
}


def stock_states(
    name: str, model, images, values: dict[int, str]
) -> tuple[dict[str, torch.Tensor], dict]:
    """The states and the logits of the stock class's full forward, with text after the image, and parts of layers."""
    stock = STOCK[name]
    ids, is_image = asked_ids(name)
    decoder = attrgetter(stock.decoder)(model)
    encoder = attrgetter(stock.encoder)(model)
    norm = getattr(decoder, stock.norm)
    states_by_site = {}
    calls = []  # PaddleOCR-VL's adapter runs image by image

    def entering(_, args):
        calls.append(torch.cat(args, -1) if name == "deepseek_vl_hybrid" else args[0])

    def embedded(_, args, kwargs):
        states_by_site["adapter"] = kwargs["inputs_embeds"]

    with (
        recorded(decoder.layers, values, "mlp" if name == "exaone4_5" else "") as parts,
        encoder.register_forward_pre_hook(entering),
        decoder.register_forward_pre_hook(embedded, with_kwargs=True),
        norm.register_forward_hook(
            lambda _, args, output: states_by_site.update(final_norm=output)
        ),
        torch.no_grad(),
    ):
        states_by_site["logits"] = model(use_cache=False, **stock_inputs(name, images, ids)).logits
    states_by_site |= {f"layer_{i:02d}": parts["out", i] for i in LAYERS}
    states_by_site = {site: state[:, is_image] for site, state in states_by_site.items()}
    return states_by_site | {"encoder": torch.cat(calls)}, parts


def test_there_are_tests_for_all_families():
    with_llm = {name for name, family in FAMILIES.items() if family.has_llm}
    assert set(ALL) == with_llm - {"llava_bidir"}


@pytest.mark.parametrize("name", [*ALL, *LLMS])
def test_states_equal_hooks_on_the_stock_forward(name, load_family, tmp_path):
    """And parts of layers what these add: values are those of `v_proj`, in Phi-3 the last quarter of its output."""
    part_of = VALUE_PATHS.get(name, "self_attn.v_proj")
    values = dict.fromkeys(VALUES[name][0] if name in VALUES else LAYERS, part_of)
    fused = name == "phi3"
    if name in LLMS:
        attention, text = LLMS[name]
        path = write("llava", tmp_path, attention, model_type=name, **text)
        read, name = probes.load(path, device="cpu"), "llava"
    else:
        read = load_family(name)
    images = pictures(name)
    states = read.states(read.preprocess(images), "all_parts")
    stock, parts = stock_states(name, model=read.model, images=images, values=values)
    layers = ["layer_01", "layer_02", "layer_03"]
    assert read.sites == ["encoder", "adapter", *layers, "final_norm"]
    for site, state in states.items():
        assert state.shape == (2, read.image_tokens, read.widths[site])
    check_parts(
        states, recorded=parts, depth=layer_depth(name), is_image=asked_ids(name)[1], fused=fused
    )
    # the same kernels on the same shapes, bit by bit, but for tiles, which make another batch of the stock encoder's,
    # patches that pad the image, and pixels resized before or after normalisation
    same = name not in ("llava_next", "llava_onevision", "gemma4", "deepseek_vl_hybrid")
    depth = 0 if same else 3  # layers of encoder and adapter
    assert_near(states["adapter"], stock["adapter"], depth)
    encoder = stock["encoder"][:: 3 if STOCK[name].extra else 1]  # views: whole, tile, tile
    encoder = encoder.reshape(len(images), read.image_tokens, -1)
    if "window_size" in STOCK[name].config["vision_config"]:  # tokens run by windows of 4 x 4
        order = torch.arange(SIDE**2).view(SIDE // 4, 4, SIDE // 4, 4).transpose(1, 2)
        encoder = encoder[:, order.flatten().argsort()]
    if name == "paddleocr_vl":  # patches run in raster order; a token has 2 x 2
        order = torch.arange(4 * SIDE**2).view(SIDE, 2, SIDE, 2).transpose(1, 2)
        patches = encoder.reshape(len(images), 4 * read.image_tokens, -1)
        encoder = patches[:, order.reshape(SIDE**2, 4)].flatten(2)
    assert_near(states["encoder"], encoder, depth)
    for site in (*layers, "final_norm"):
        depth += layer_depth(name)
        assert_near(states[site], stock[site], depth)
    assert all(states[site].std() > 1e-3 for site in read.sites), "nothing is compared"
    last = {site: states[site] for site in ("layer_03", "final_norm")}
    for logits in read.logit_lens(last).values():
        assert_near(logits, stock["logits"], depth + 1)


def test_logit_lens_caps_logits_as_the_stock_forward_does(load_family, monkeypatch):
    read = load_family("gemma4")
    images = pictures("gemma4")
    config = read.model.config.get_text_config()
    plain = read.logit_lens(read.states(read.preprocess(images), ["final_norm"]))["final_norm"]
    monkeypatch.setattr(config, "final_logit_softcapping", 0.05, raising=False)
    stock, _ = stock_states("gemma4", model=read.model, images=images, values={})
    states = read.states(read.preprocess(images), ["final_norm"])
    near = rounding(plain, 3 + 3 + 1)  # capping does not increase errors
    torch.testing.assert_close(read.logit_lens(states)["final_norm"], stock["logits"], **near)


@pytest.mark.parametrize("name", ALL)
def test_states_lie_in_raster_order(name, load_family):
    """Without attention in the encoder, a change of the pixels of one token reaches that token alone."""
    read = deepcopy(load_family(name))
    decoder = set(read.decoder.modules())
    attention = [
        module
        for module in read.model.model.modules()
        if module not in decoder and type(module).__name__.endswith("Attention")
    ]
    assert attention or name == "gemma4_unified"  # whose LLM reads patches
    for module in attention:
        [weight.zero_() for weight in module.parameters()]
    rows, columns = STOCK[name].grid
    token_px = STOCK[name].image_px // columns
    pixels = read.preprocess(pictures(name, 1))
    before = read.states(pixels, ["encoder", "adapter"])
    for row, column in ((0, 1), (1, 0), (rows - 1, 1), (1, columns - 1)):
        changed = pixels.clone()
        changed[..., row * token_px :, column * token_px :][..., :token_px, :token_px] += 1.0
        after = read.states(changed, ["encoder", "adapter"])
        for site in before:
            moved = (after[site] - before[site]).norm(dim=-1)[0]
            assert moved.argmax() == row * columns + column, (site, row, column)
            if name != "deepseek_vl_hybrid":  # its convolutions and resizing reach over patches
                assert (moved > 0).sum() == 1, (site, row, column)


@pytest.mark.parametrize("name", MASKABLE)
def test_rows_of_an_image_equal_a_batch_with_copies_of_it(name, load_family):
    """In all windows of layers, also under hooks, at all sites; some families share the encoder."""
    read = load_family(name)
    pixels = read.preprocess(pictures(name))
    images = [1, 0, 1, 1]
    blocked = torch.arange(read.image_tokens) == torch.tensor([3, 3, 4, read.image_tokens])[:, None]
    windows = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool()
    change = {
        "knockout": Knockout(blocked, windows),
        "hooks": {"layer_03": lambda states: states / torch.arange(1, 5)[:, None, None]},
    }
    together = read.states(pixels, "all_parts", rows=images, **change)
    copies = read.states(pixels[images], "all_parts", **change)
    for site, expected in copies.items():
        number = site[-2:]  # of a layer, or of a part of it
        depth = 1 + int(number) if number.isdigit() else max(read.sites.index(site), 1)
        assert_near(together[site], expected, depth)


@pytest.mark.parametrize("name", sorted({*ALL} - {*SEVERAL_WAYS_IN}))
def test_a_plain_hook_at_image_positions_equals_a_hook_of_states(name, load_family):
    frozen = load_family(name)
    pixels = frozen.preprocess(pictures(name))
    vector = torch.linspace(-1, 1, frozen.widths["layer_01"])
    expected = frozen.states(pixels, hooks={"layer_01": lambda states: states + vector})

    def add(_, args, output):
        output = output.clone()
        output[:, frozen.image_positions] += vector
        return output

    with frozen.layers[0].register_forward_hook(add):
        states = frozen.states(pixels)
    assert all(torch.equal(states[site], expected[site]) for site in frozen.sites)
    plain = frozen.states(pixels)
    assert not torch.allclose(states["final_norm"], plain["final_norm"], atol=1e-3)


@pytest.mark.parametrize("name", ALL)
def test_states_of_another_image_at_a_complete_site_leave_nothing_of_the_image(name, load_family):
    frozen = load_family(name)
    image, other = (frozen.preprocess(picture) for picture in pictures(name))
    wanted = frozen.states(other)
    unchecked = copy(frozen)
    unchecked.family = replace(frozen.family, incomplete_sites=lambda config: 0)

    def is_complete(site) -> bool:
        """Whether the last states are the other image's, with its states at a site."""
        hooks = {site: lambda _: wanted[site]}
        last = unchecked.states(image, ["final_norm"], hooks=hooks)["final_norm"]
        return (last - wanted["final_norm"]).norm() < 1e-4 * wanted["final_norm"].norm()

    sites = frozen.layer_sites
    count = frozen.family.incomplete_sites(frozen.model.config)
    assert [is_complete(site) for site in sites].index(True) == count
    for site in sites[:count]:
        said = f"hook at '{site}': .* {name} after it.* expected {sites[count]} or"
        hooks = {site: torch.zeros_like}
        with pytest.raises(ValueError, match=said):
            frozen.states(image, hooks=hooks)
        with pytest.raises(ValueError, match=said):
            frozen.answer_log_probs(image, "hello", ["sky"], hooks=hooks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_matched_controls_have_the_trained_updates(name, checkpoint, load_family):
    trained = load_family(name)
    images = pictures(name)
    pixels = trained.preprocess(images)
    control = probes.load(checkpoint(name), untrained=["llm"], match="update", match_images=images)
    assert layer_updates(control, pixels) == pytest.approx(layer_updates(trained, pixels), rel=0.01)
    assert torch.equal(control.states(pixels)["adapter"], trained.states(pixels)["adapter"])


def test_a_random_adapter_is_random_for_all_features_of_the_same_encoder(checkpoint, load_family):
    """Qwen3-VL has a merger for features of an earlier layer, too."""
    trained = load_family("qwen3_vl")
    control = probes.load(checkpoint("qwen3_vl"), untrained=["adapter"])
    pixels = trained.preprocess(pictures("qwen3_vl"))
    before, after = (frozen.states(pixels) for frozen in (trained, control))
    assert torch.equal(after["encoder"], before["encoder"])
    assert not torch.allclose(after["adapter"], before["adapter"])
    weights, random = (dict(frozen.model.named_parameters()) for frozen in (trained, control))
    adapter_keys = [key for key in weights if "merger" in key and key.endswith("linear_fc1.weight")]
    assert len(adapter_keys) == 2
    assert not any(torch.equal(weights[key], random[key]) for key in adapter_keys)


def test_an_initialisation_that_makes_all_states_equal_is_an_error(checkpoint):
    with pytest.raises(
        ValueError, match="the initialisation of this model sets mm_input_projection_weight to zero"
    ):
        probes.load(checkpoint("gemma3"), untrained=["adapter"])


@pytest.mark.parametrize("name", [name for name in ALL if not STOCK[name].masks])
def test_layers_without_masks_run_as_they_are_only(name, checkpoint, load_family):
    read = load_family(name)
    pixels = read.preprocess(pictures(name, 1))
    nothing = Knockout(torch.zeros(1, read.image_tokens, dtype=torch.bool))
    text = Knockout(rows="last", columns="image")
    changes = (
        lambda: read.states(pixels, knockout=nothing),
        lambda: read.answer_log_probs(pixels, question="hello", answers=["hello"], knockout=text),
        lambda: probes.load(checkpoint(name), image_attention="bidirectional"),
    )
    for change in changes:
        with pytest.raises(ValueError, match="knockouts are not supported by .* layers"):
            change()
    for weights in (
        lambda: read.attention(pixels),
        lambda: read.answer_attention(pixels, "hello", "hello"),
    ):
        with pytest.raises(ValueError, match="cannot be read: layer 1 has linear attention"):
            weights()


def test_a_mask_for_sliding_windows_needs_some(checkpoint):
    with pytest.raises(ValueError, match="'bidirectional_sliding' needs sliding-window layers"):
        probes.load(checkpoint("qwen2_vl"), image_attention="bidirectional_sliding")


def test_incomplete_checkpoints_are_errors(checkpoint, tmp_path):
    def broken(name, old, new, *files):
        folder = shutil.copytree(checkpoint(name), tmp_path / new)
        for file in files:
            (folder / file).write_text((folder / file).read_text().replace(old, new))
        return str(folder)

    no_mean = broken("llava", "image_mean", "image_meen", "preprocessor_config.json")
    with pytest.raises(ValueError, match="image_mean is None; expected three positive numbers"):
        probes.load(no_mean)
    no_image = broken("llava", "<image>", "<picture>", "chat_template.jinja")
    with pytest.raises(ValueError, match="has no <image> for an image"):
        probes.load(no_image)
    assert probes.load(no_image, prefix="hello").prefix_ids.tolist() == [[WORDS["hello"]]]
    files = "tokenizer.json", "tokenizer_config.json"
    no_token = broken("mistral3", "[IMG_BREAK]", "[IMG_BROKEN]", *files)
    with pytest.raises(ValueError, match=r"has no token \[IMG_BREAK\]"):
        probes.load(no_token)


# ------------------------------------------------------------------------------------------- parts of layers
@pytest.mark.parametrize("name", ["llava", "gemma4", "aya_vision"])
def test_a_part_read_alone_is_the_same_and_the_forward_ends_there(name, load_family):
    frozen = load_family(name)
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
def test_values_that_are_not_of_one_token_are_refused(name, load_family):
    frozen = load_family(name)
    pixels = frozen.preprocess(pictures(name, 1))
    layers, why = VALUES[name]
    with pytest.raises(UserError, match=f"^layer 1 has {why}; leave out value_01$"):
        frozen.states(pixels, ["value_01"])
    values = [site for site in frozen.states(pixels, "all_parts") if site.startswith("value_")]
    assert values == [f"value_{layer:02d}" for layer in layers]


def test_values_that_a_layer_takes_from_an_earlier_one_are_refused(tmp_path):
    """Gemma 4's last layers have no values of their own."""
    text = {
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    frozen = probes.load(write("gemma4", tmp_path, **text), device="cpu")
    pixels = frozen.preprocess(pictures("gemma4", 1))
    with pytest.raises(UserError, match="layer 3 has no values of its own, .*; leave out value_03"):
        frozen.states(pixels, ["value_03"])
    states = frozen.states(pixels, "all_parts")
    assert "value_03" not in states and {"value_02", "attn_03", "mlp_03"} < states.keys()
