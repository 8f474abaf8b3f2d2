"""Random LLMs that resemble the trained one: their updates, weights and draws, and the runs made with them."""

import probe_runs
import pytest
import torch
from PIL import Image

import probes
from probes.models.matched_updates import layer_updates

pytestmark = pytest.mark.numerics

LLM = {"untrained": ["llm"]}


@pytest.fixture(scope="module")
def pictures():
    generator = torch.Generator().manual_seed(0)
    arrays = torch.randint(0, 255, (5, 20, 30, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(params=["causal", "bidirectional"])
def path(request, checkpoints):
    return str(checkpoints[request.param])


def reference_updates(mllm, pixels):
    """Relative updates from the stock forward's own hidden states, in a loop over tokens."""
    tokens = mllm.grid[0] * mllm.grid[1]
    image = torch.full((len(pixels), tokens), mllm.model.config.image_token_id)
    ids, seen = torch.cat([mllm.prefix_ids.expand(len(pixels), -1), image], 1), []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        for layer in mllm.decoder.layers
    ]
    mllm.model(ids, pixels, use_cache=False)
    for hook in hooks:
        hook.remove()
    updates = []
    for x, y in seen:
        x, y = x[:, -tokens:].flatten(0, 1), y[:, -tokens:].flatten(0, 1)
        updates.append(sum(float((b - a).norm() / a.norm()) for a, b in zip(x, y, strict=True)) / len(x))
    return updates


def test_updates_equal_the_trained_ones(path, pictures):
    trained = probes.load(path)
    pixels = trained.preprocess(pictures)
    wanted = reference_updates(trained, pixels)
    assert layer_updates(trained, pixels) == pytest.approx(wanted, rel=1e-4)
    control = probes.load(path, **LLM, match="update", match_images=pictures)
    assert reference_updates(control, pixels) == pytest.approx(wanted, rel=0.01)
    inert = reference_updates(probes.load(path, **LLM), pixels)
    assert max(abs(now / then - 1) for now, then in zip(inert, wanted, strict=True)) > 0.05, "nothing to match"


def test_the_scales_are_those_of_the_output_projections(path, pictures):
    control = probes.load(path, **LLM, match="update", match_images=pictures)
    same = probes.load(path, **LLM, match="update", update_scales=[1.0] * len(control.decoder.layers))
    for layer, scale in zip(same.decoder.layers, control.update_scales, strict=True):
        layer.self_attn.o_proj.weight.mul_(scale)
        layer.mlp.down_proj.weight.mul_(scale)
    pixels = control.preprocess(pictures)
    for site, states in same.states(pixels).items():
        torch.testing.assert_close(control.states(pixels)[site], states, rtol=1e-4, atol=1e-5)


def test_only_the_layers_are_random(path, pictures):
    trained, control = probes.load(path), probes.load(path, **LLM, match="update", match_images=pictures)
    before, after = (dict(m.model.named_parameters()) for m in (trained, control))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("language_model.layers." in name for name in changed)
    matrices = {name for name, p in before.items() if "language_model.layers." in name and p.ndim == 2}
    assert matrices <= changed


def test_permuted_weights_keep_the_values_of_each_matrix(path):
    trained, control = probes.load(path), probes.load(path, **LLM, match="permuted")
    for (name, before), after in zip(trained.model.named_parameters(), control.model.parameters(), strict=True):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values), name
        moved = "language_model.layers." in name and before.ndim == 2
        assert torch.equal(before, after) != moved, name


@pytest.mark.parametrize("match", ["update", "permuted"])
def test_draws_differ_and_are_repeated_from_what_a_run_records(match, path, pictures):
    images = {"match_images": pictures} if match == "update" else {}
    load = lambda draw, **kwargs: probes.load(path, **LLM, match=match, draw=draw, **kwargs)
    first, other = load(0, **images), load(1, **images)
    again = load(0, update_scales=first.update_scales)
    pixels = first.preprocess(pictures)
    states = [m.states(pixels)["layer_03"] for m in (first, other, again)]
    assert torch.equal(states[0], states[2]) and not torch.allclose(states[0], states[1], rtol=0.01)


def test_what_does_not_describe_a_control_is_an_error(path, pictures):
    with pytest.raises(ValueError, match="match 'update' describes a random LLM; add llm to untrained"):
        probes.load(path, untrained=["adapter"], match="update", match_images=pictures)
    with pytest.raises(ValueError, match="unknown match 'updates'; expected none, update, permuted"):
        probes.load(path, **LLM, match="updates")
    with pytest.raises(ValueError, match="needs images to measure updates on; pass match_images"):
        probes.load(path, **LLM, match="update")


def test_an_update_that_cannot_be_reached_is_an_error(path, pictures, monkeypatch):
    monkeypatch.setattr("probes.models.matched_updates.branch_outputs", lambda layer: [])
    with pytest.raises(ValueError, match="layer 1 of the random LLM changes its input by .*cannot be matched"):
        probes.load(path, **LLM, match="update", match_images=pictures)


def test_analyses_of_a_run_read_the_same_random_model(checkpoints, segmentation, tmp_path):
    control = ["-c", "configs/probes/matched.yaml", "--model.draw", "2"]
    run = probe_runs.fit(checkpoints["causal"], segmentation, tmp_path / "run", *control)
    assert (run.metrics["match"], run.metrics["draw"], run.metrics["untrained"]) == ("update", 2, ["llm"])
    mllm, images = run.mllm(), [run.dataset()[i]["image"] for i in range(len(run.dataset()))]
    assert mllm.update_scales == run.manifest["config"]["update_scales"]
    # the saved counts are those of the probes on the states of this model
    site, right = run.sites.index("layer_02"), 0
    for i, image in enumerate(images):
        target = torch.from_numpy(run.dataset()[i]["target"])
        right += int((torch.from_numpy(run.predict(image, "layer_02")) == target).sum())
    assert right == int(run.counts.intersection[site].sum())
