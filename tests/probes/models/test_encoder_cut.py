"""Knockouts inside encoders: which tokens see which, measured by gradients in the layers, against loops over pairs."""

from functools import partial

import pytest
import tiny_encoders
import tiny_models
import torch
from encoder_cuts import assert_cut
from tiny_families import pictures
from tolerances import assert_near

import probes
from llava_bidir.common.errors import UserError
from probes.models import load
from probes.models.encoder_cut import layers_of_encoder
from probes.models.hooks import around
from probes.models.measured_mask import seen_in_layers

pytestmark = [pytest.mark.numerics, pytest.mark.usefixtures("small_squares")]

BARE = ["clip", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "vit", "beit", "radio"]
CUTTABLE = ["deepseek_vl", "llava", "paligemma", "vipllava"]
REFUSED = {
    "qwen2_5_vl": "patches attend within windows",
    "qwen3_vl": "DeepStack",
    "llava_next": "photos are tiles",
    "internvl": "photos are tiles",
    "qwen2_vl": "attention is not known to take a mask",
    "gemma3": "averages 2 x 2 patches",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    def load(name, backend="sdpa"):
        folder = tiny_encoders.STOCK[name].write(tmp_path_factory.mktemp(name))
        return probes.load(folder, device="cpu", attn_implementation=backend)

    return load


@pytest.mark.parametrize("keep_extra", [True, False])
@pytest.mark.parametrize("name", BARE)
def test_patches_of_a_bare_encoder_see_themselves_alone(name, keep_extra, bare):
    model = bare(name, backend="eager" if name in ("vit", "clip") else "sdpa")
    pixels = torch.randn(2, 3, model.geometry.image_px, model.geometry.image_px)
    assert_cut(model, pixels, layers=[1, 3], keep_extra=keep_extra)


@pytest.mark.parametrize("name", CUTTABLE)
def test_patches_of_the_encoder_of_an_mllm_see_themselves_alone(name, load_family):
    model = load_family(name)
    pixels = model.preprocess(pictures(name))
    for keep_extra in (True, False):
        assert_cut(model, pixels, layers=None, keep_extra=keep_extra)


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_encoders_that_cannot_be_cut_are_refused_by_name(
    name, reason, load_family, checkpoint, monkeypatch
):
    model = load_family(name)
    with pytest.raises(UserError, match=f"{name}.*{reason}"):
        model.states(model.preprocess(pictures(name)), knockout=probes.Knockout(site="encoder"))
    monkeypatch.setattr(load, "load_weights", None)  # before weights are loaded
    with pytest.raises(UserError, match=f"{name}.*{reason}"):
        probes.load(checkpoint(name), cut="encoder")


def test_blocked_patches_are_those_of_each_row(checkpoints):
    """In states, the row of a picture alone; in answers, as the states say."""
    mllm = probes.load(checkpoints["causal"])
    pixels = tiny_models.pixels(1)
    blocked = torch.tensor([[False, True, False, True], [True, True, True, True]])
    both = probes.Knockout(blocked, site="encoder", layers=[1])
    states = mllm.states(pixels, ["encoder"], both, rows=[0, 0])["encoder"]
    for row, tokens in zip(states, blocked, strict=True):
        one = probes.Knockout(tokens[None], site="encoder", layers=[1])
        assert_near(row[None], mllm.states(pixels, ["encoder"], one)["encoder"], 1)
    alone = probes.Knockout(site="encoder", layers=[1])
    assert_near(states[1:], mllm.states(pixels, ["encoder"], alone)["encoder"], 1)
    assert (states[0] - states[1]).abs().max() > 1e-4
    asked = {"question": "name the sky", "answers": ["sky wall"]}
    hooked = mllm.states(pixels, ["adapter"], alone)["adapter"]
    expected = mllm.answer_log_probs(pixels, **asked, hooks={"adapter": lambda _: hooked})
    assert_near(mllm.answer_log_probs(pixels, **asked, knockout=alone), expected, 2)
    assert (mllm.answer_log_probs(pixels, **asked) - expected).abs().max() > 1e-5


def test_what_does_not_fit_is_an_error(checkpoints):
    mllm = probes.load(checkpoints["causal"])
    for wrong, message in (
        ({"site": "adapter"}, "expected 'encoder' or None"),
        ({"site": "encoder", "columns": "prefix"}, "leave out rows and columns"),
        ({"blocked": torch.ones(1, 4).bool(), "keep_extra": False}, "needs site='encoder'"),
    ):
        with pytest.raises(UserError, match=message):
            probes.Knockout(**wrong)
    for layers in ([99], [0]):
        with pytest.raises(UserError, match="out of range"):
            cut = probes.Knockout(site="encoder", layers=layers)
            mllm.states(tiny_models.pixels(1), knockout=cut)


def test_a_layer_that_runs_without_its_cut_attention_is_an_error(checkpoints):
    mllm = probes.load(checkpoints["causal"])
    layer = layers_of_encoder(mllm)[0]
    with (
        around(layer, lambda forward, states, *args, **kwargs: states),
        pytest.raises(RuntimeError, match="layer 1 of the encoder ran without"),
    ):
        mllm.states(tiny_models.pixels(1), knockout=probes.Knockout(site="encoder"))


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "prefix"])
def test_image_tokens_of_a_cut_llm_see_themselves_and_the_text_before(mask, checkpoints):
    """In all forwards, also those of answers, whose question sees all image tokens."""
    mllm = probes.load(checkpoints[mask], cut="llm")
    tokens = torch.arange(len(mllm.is_image))
    along = torch.randn(mllm.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    first = mllm.is_image.tolist().index(True)
    question = {"question": "name the sky", "answers": ["sky"]}
    for run in (mllm.states, partial(mllm.answer_log_probs, **question)):
        seen = seen_in_layers(mllm.layers, tokens, along, partial(run, tiny_models.pixels(1)))
        for query in range(first, len(tokens)):
            image = seen[:, query, first : len(tokens)]
            assert (image == (tokens[first:] == query)).all(), query
            assert seen[:, query, :first].all()
        if run != mllm.states:
            assert seen.shape[2] > len(tokens)
    both = probes.load(checkpoints[mask], cut="both_alone")
    changed = tiny_models.pixels(1)
    changed[..., :4, :4] += 1  # of the first patch
    before, after = (both.states(x)["layer_03"][0] for x in (tiny_models.pixels(1), changed))
    assert (before != after).any(-1).tolist() == [True, False, False, False]
