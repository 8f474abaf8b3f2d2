"""Results do not depend on what a model did before: a plain forward, hooks, a knockout, a measured mask.

transformers reads hidden states by hooks of its own, which it installs in the first forward that asks for them. A hook
that a user registers afterwards on such a layer comes too late: its output is read, but not what the hook returns.
"""

import copy

import numpy as np
import pytest
import tiny_encoders
import tiny_families
import tiny_models
import torch
from PIL import Image
from torch import Tensor

import probes
from llava_bidir.common.errors import UserError
from probes import Knockout
from probes.models.attention_masks import supports_masks

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]


def photos(side: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 255, (2, side, side, 3), np.uint8)
    return [Image.fromarray(image) for image in noise]


def load_mllm(name: str, checkpoints: dict, folder) -> tuple:
    """Return a loaded model that has not run yet, its images, and the arguments of a plain forward."""
    if name == "llava_bidir":
        frozen = probes.load(str(checkpoints["bidirectional"]), device="cpu")
        images = photos(tiny_models.vision_config().image_size)
        tokens = torch.full((1, frozen.image_tokens), frozen.model.config.image_token_id)
        ids = torch.cat([frozen.prefix_ids, tokens, frozen.prefix_ids], 1).expand(2, -1)
        plain = {
            "input_ids": ids,
            "pixel_values": frozen.preprocess(images),
        }
        return frozen, images, plain
    frozen = probes.load(str(tiny_families.write(name, folder)), device="cpu")
    images = photos(tiny_families.STOCK[name].image_px)
    return frozen, images, tiny_families.stock_inputs(name, images)


def load_encoder(name: str, folder) -> tuple:
    stock = tiny_encoders.STOCK[name]
    frozen = probes.load(stock.write(folder / name), device="cpu")
    images = photos(tiny_encoders.STORED_PX)
    return frozen, images, stock.inputs(frozen.preprocess(images))


@torch.no_grad()
def run_plain(frozen, inputs: dict) -> Tensor:
    """Return the output of a plain forward, in which transformers installs its hooks."""
    if not frozen.has_llm:
        return frozen.model(**inputs, output_hidden_states=True).last_hidden_state
    return frozen.model(
        **inputs,
        use_cache=False,
        output_hidden_states=True,
    ).logits


def all_sites(frozen) -> list[str]:
    """Return the sites of a model, with the layers of its encoder if they can be read."""
    try:
        return frozen.check_sites("all")
    except UserError:
        return frozen.sites


def takes_knockouts(frozen) -> bool:
    """Return whether attention can be cut."""
    if frozen.has_llm:
        return supports_masks(frozen.model.config.get_text_config())
    return frozen.model.config.model_type != "data2vec-vision"


def calls(frozen, images: list[Image.Image]) -> dict:
    """Return functions by name, which map a model to tensors by name."""
    pixels = frozen.preprocess(images)
    sites = all_sites(frozen)
    blocked = torch.arange(frozen.image_tokens).expand(len(images), -1) == 1
    middle = "layer_02"
    first = "adapter" if frozen.has_llm else "layer_00"

    def hooked(site: str):
        return lambda model: model.states(pixels, sites, hooks={site: lambda states: -2 * states})

    functions = {"states": lambda model: model.states(pixels, sites)}
    if frozen.model.config.model_type not in tiny_families.SEVERAL_WAYS_IN:
        functions |= {"hook at the input": hooked(first), "hook at a layer": hooked(middle)}
    if takes_knockouts(frozen):
        functions["knockout"] = lambda model: model.states(pixels, sites, Knockout(blocked))
    if frozen.has_llm:
        functions["measured mask"] = lambda model: {"seen": model.measured_mask().seen}
    return functions


def check_every_order(frozen, images: list[Image.Image], inputs: dict) -> None:
    """Compare each call on a model that has not run with the call after a plain forward, and the forwards, too."""
    used = copy.deepcopy(frozen)
    plain = run_plain(used, inputs)
    functions = calls(frozen, images)
    found = {}
    for name, function in functions.items():
        fresh = copy.deepcopy(frozen)
        found[name] = function(fresh)
        after = function(used)
        assert found[name].keys() == after.keys()
        for site, value in after.items():
            assert torch.equal(found[name][site], value), (name, site)
        for model in (fresh, used):
            assert torch.equal(run_plain(model, inputs), plain), f"a forward after: {name}"
    for name in functions.keys() - {"states", "measured mask"}:
        changed = found[name]["layer_03"]
        assert not torch.equal(changed, found["states"]["layer_03"]), f"{name} has no effect"


@pytest.mark.parametrize("name", ["llava_bidir", *sorted(tiny_families.STOCK)])
def test_calls_before_and_after_a_plain_forward_agree(name, checkpoints, tmp_path):
    check_every_order(*load_mllm(name, checkpoints, tmp_path))


@pytest.mark.parametrize("name", sorted(tiny_encoders.STOCK))
def test_calls_of_an_encoder_before_and_after_a_plain_forward_agree(name, tmp_path):
    check_every_order(*load_encoder(name, tmp_path))
