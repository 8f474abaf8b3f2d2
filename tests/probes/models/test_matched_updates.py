"""Random LLMs that resemble the trained one: their updates, weights and draws, and the runs made with them."""

import shutil
from collections import Counter

import probe_runs
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import probes
from llava_bidir import LlavaBidirConfig, LlavaBidirForConditionalGeneration
from probes.models.random_weights import COARSE_TOLERANCE, FINE_TOLERANCE, layer_updates

pytestmark = pytest.mark.numerics

LLM = {"untrained": ["llm"]}
UPDATE = LLM | {"match": "update"}


@pytest.fixture
def path(checkpoints):
    return str(checkpoints["causal"])


def reference_updates(mllm, pixels):
    """Relative updates of image tokens, from the stock forward's own hidden states."""
    seen = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for layer in mllm.decoder.layers
    ]
    mllm.model(mllm.ids.expand(len(pixels), -1), pixels, use_cache=False)
    for hook in hooks:
        hook.remove()
    places = mllm.image_positions
    relative = [(y - x)[:, places].norm(dim=-1) / x[:, places].norm(dim=-1) for x, y in seen]
    return [of_layer.mean().item() for of_layer in relative]


def matched_from_the_first_layer(mllm, pixels, updates):
    """The factors of each layer by complete forwards, with the weights of the projections multiplied."""
    factors = []
    for i, (layer, wanted) in enumerate(zip(mllm.decoder.layers, updates, strict=True)):
        factors.append(1.0)
        while abs((now := reference_updates(mllm, pixels)[i]) - wanted) > FINE_TOLERANCE * wanted:
            factors[i] *= wanted / now
            layer.self_attn.o_proj.weight.mul_(wanted / now)
            layer.mlp.down_proj.weight.mul_(wanted / now)
    return factors


def test_the_scales_are_those_of_complete_forwards_layer_by_layer(
    checkpoints, pictures, tmp_path, monkeypatch
):
    """Of six layers, none of which runs again for the layers after it."""
    deep = shutil.copytree(checkpoints["bidirectional"], tmp_path / "hf")
    config = LlavaBidirConfig.from_pretrained(deep)
    config.text_config.num_hidden_layers = 6
    torch.manual_seed(0)
    built = LlavaBidirForConditionalGeneration._from_config(config)
    tiny_models.sharpen(built)
    built.save_pretrained(deep)
    trained = probes.load(deep)
    pixels = trained.preprocess(pictures)
    calls = Counter()
    original = LlamaDecoderLayer.forward

    def counted(layer, *args, **kwargs):
        calls[layer.self_attn.layer_idx] += 1
        return original(layer, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    control = probes.load(deep, **UPDATE, match_images=pictures)
    monkeypatch.undo()
    # the trained update (prompt and image), and a few steps of its own: as many for the first layer as for the last
    assert set(calls) == set(range(6)) and max(calls.values()) <= 8, calls
    same_draw = probes.load(deep, **UPDATE, update_scales=[1.0] * 6)
    expected = matched_from_the_first_layer(same_draw, pixels, reference_updates(trained, pixels))
    assert control.update_scales == pytest.approx(expected, rel=1e-4)


def test_updates_are_matched_in_bfloat16_as_far_as_its_rounding_allows(
    checkpoints, pictures, tmp_path
):
    """States of image tokens that are large beside the updates; the trained updates are 0.3% of them."""
    path = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if "projector.linear_2" in name:
            weights[name] = 8 * weights[name]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    trained = probes.load(path, dtype="bfloat16")
    updates = layer_updates(trained, trained.preprocess(pictures))
    control = probes.load(path, **UPDATE, match_images=pictures, dtype="bfloat16")
    found = layer_updates(control, control.preprocess(pictures))
    assert found == pytest.approx(updates, rel=1.1 * COARSE_TOLERANCE)


@pytest.mark.parametrize("match", ["none", "permuted"])
def test_draws_differ(match, path, pictures):
    drawn = []
    for draw in (0, 2):
        control = probes.load(path, **LLM, match=match, draw=draw)
        drawn.append(control.states(control.preprocess(pictures))["layer_03"])
    assert not torch.allclose(*drawn, rtol=0.01)


def test_updates_that_cannot_be_matched_are_an_error(path, pictures, monkeypatch):
    monkeypatch.setattr("probes.models.random_weights.MATCH_STEPS", 1)
    with pytest.raises(ValueError, match="cannot be matched"):
        probes.load(path, **UPDATE, match_images=pictures)


def test_permuted_weights_keep_the_values_of_each_matrix(path):
    trained = probes.load(path)
    control = probes.load(path, **LLM, match="permuted")
    for (name, before), after in zip(
        trained.model.named_parameters(), control.model.parameters(), strict=True
    ):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values), name
        moved = "language_model.layers." in name and before.ndim == 2
        assert torch.equal(before, after) != moved, name


def test_analyses_of_a_run_read_the_same_random_model(checkpoints, segmentation, tmp_path):
    control = "-c configs/probes/matched.yaml --model.draw 2 --model.sites [layer_02]".split()
    run = probe_runs.fit(checkpoints["causal"], segmentation, tmp_path / "run", *control)
    assert [run.metrics[key] for key in ("match", "draw", "untrained")] == ["update", 2, ["llm"]]
    assert run.mllm().update_scales == run.manifest["config"]["update_scales"]
    # the saved counts are those of the probes on the states of this model
    right = 0
    for item in run.dataset():
        target = torch.from_numpy(item["target"])
        right += int((torch.from_numpy(run.predict(item["image"], "layer_02")) == target).sum())
    assert right == int(run.counts.intersection.sum())
