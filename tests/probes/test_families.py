"""Every family on a tiny random instance of its real class, against plain hooks on that class's own forward."""

from operator import attrgetter

import families
import numpy as np
import pytest
import torch
from families import IMAGE_ID, STOCK
from PIL import Image

import probes
from probes import Knockout
from probes.families import FAMILIES, family_of, own_image_attention
from probes.inspection import print_sites

ALL = sorted(STOCK)
LAYERS = ["layer_01", "layer_02", "layer_03"]
SUFFIX = [3, 4, 3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Paths of checkpoints, each written once."""
    written = {}

    def path(name):
        if name not in written:
            written[name] = str(families.write(name, tmp_path_factory.mktemp(name)))
        return written[name]

    return path


@pytest.fixture(scope="module")
def mllm(checkpoint):
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = probes.load(checkpoint(name))
        return loaded[name]

    return load


def pictures(name: str, count: int = 2) -> list[Image.Image]:
    side, generator = STOCK[name].image_px, np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(count)]


def stock_ids(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole prompt, long[N], and which of its tokens are those of the (whole view of the) image, bool[N]."""
    stock, vocabulary = STOCK[name], families.tokenizer().get_vocab()
    rows, columns = stock.grid
    prefix = [vocabulary[token] for token in stock.prefix]
    image = [i for _ in range(rows) for i in [IMAGE_ID] * columns + ([vocabulary[stock.row_end]] if stock.row_end else [])]
    ids = prefix + image + [IMAGE_ID] * stock.extra + SUFFIX
    is_image = torch.tensor(ids) == IMAGE_ID
    is_image[len(prefix) + len(image) :] = False
    return torch.tensor(ids), is_image


def stock_states(name: str, model, images, mask=None) -> dict[str, torch.Tensor]:
    """The states of the stock class's full forward, with text after the image, by hooks."""
    stock, (ids, is_image), found = STOCK[name], stock_ids(name), {}
    decoder = attrgetter(stock.decoder)(model)
    encoder = attrgetter(stock.encoder)(model)

    def entering(_, args):
        found["encoder"] = torch.cat(args, -1) if name == "deepseek_vl_hybrid" else args[0]

    def embedded(_, args, kwargs):
        found["adapter"] = kwargs["inputs_embeds"]

    def out(site):
        return lambda _, args, output: found.__setitem__(site, output[0] if isinstance(output, tuple) else output)

    hooks = [encoder.register_forward_pre_hook(entering)]
    hooks += [decoder.register_forward_pre_hook(embedded, with_kwargs=True)]
    hooks += [layer.register_forward_hook(out(site)) for site, layer in zip(LAYERS, decoder.layers, strict=True)]
    hooks += [decoder.norm.register_forward_hook(out("final_norm"))]
    types = {}
    if stock.types:
        argument, of_image, of_text = stock.types
        types[argument] = torch.where(is_image, of_image, of_text).expand(len(images), -1)
    with torch.no_grad():
        model(input_ids=ids.expand(len(images), -1), use_cache=False, **stock.inputs(images), **types)
    for hook in hooks:
        hook.remove()
    return {site: state if site == "encoder" else state[:, is_image] for site, state in found.items()}


def test_there_are_tests_for_all_families():
    assert set(ALL) == set(FAMILIES) - {"llava_bidir"} and len(ALL) >= 16


@pytest.mark.parametrize("name", ALL)
def test_states_equal_hooks_on_the_stock_forward(name, mllm):
    read, images = mllm(name), pictures(name)
    states, stock = read.states(read.preprocess(images)), stock_states(name, read.model, images)
    tokens = STOCK[name].grid[0] * STOCK[name].grid[1]
    assert list(states) == ["encoder", "adapter", *LAYERS, "final_norm"]
    exact = name not in ("llava_next", "llava_onevision")  # there the stock encoder runs in another batch, with tiles
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-4}
    if name == "deepseek_vl_hybrid":  # resized after normalisation, not before
        close = {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(states["adapter"], stock["adapter"], **close)
    encoder = stock["encoder"][:: 3] if not exact else stock["encoder"]  # the whole view is the first of three
    if name == "qwen2_5_vl":  # the stock encoder's order is that of its windows; its adapter's is not
        with torch.no_grad():
            encoder = read.model.model.visual.merger.mlp(states["encoder"])
        torch.testing.assert_close(encoder, stock["adapter"], rtol=1e-4, atol=1e-4)
        encoder = states["encoder"]
    torch.testing.assert_close(states["encoder"], encoder.reshape(len(images), tokens, -1), **close)
    for site in (*LAYERS, "final_norm"):
        scale = stock[site].abs().max().item()
        tolerance = 5e-2 if name == "deepseek_vl_hybrid" else 2e-5
        torch.testing.assert_close(states[site], stock[site], rtol=0, atol=tolerance * scale)
    assert all(states[site].std() > 1e-3 for site in states), "nothing is compared with nothing"
