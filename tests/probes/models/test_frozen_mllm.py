"""States of a frozen MLLM: read at the right places, blind to what they should not see, and up to date."""

import shutil
from contextlib import ExitStack

import pytest
import tiny_models
import torch
from tolerances import assert_near

import probes

pytestmark = pytest.mark.numerics


def full_forward(mllm, pixels):
    """Hidden states of the whole model on prefix and image, at the image's positions."""
    ids = mllm.ids.expand(len(pixels), -1)
    output = mllm.model(ids, pixels, output_hidden_states=True, use_cache=False)
    return [state[:, -tiny_models.TOKENS :] for state in output.hidden_states]


def test_states_equal_those_of_the_full_forward(mllm, pictures):
    pixels = mllm.preprocess(pictures)
    states = mllm(pixels)
    whole = full_forward(mllm, pixels)
    assert torch.equal(states["adapter"], whole[0]), "the LLM's input, bit for bit"
    for i in (1, 2):
        assert_near(states[f"layer_{i:02d}"], whole[i], i)
    assert_near(states["final_norm"], whole[3], 4)
    norm = mllm.model.model.language_model.norm
    torch.testing.assert_close(norm(states["layer_03"]), states["final_norm"])
    second_row = mllm.to_grid(states["layer_03"])[:, 1, 0]
    assert torch.equal(second_row, states["layer_03"][:, tiny_models.GRID[1]])
    tower = mllm.model.model.vision_tower(pixels, output_hidden_states=True)
    assert torch.equal(states["encoder"], tower.hidden_states[-1][:, 1:])


@pytest.mark.parametrize(("name", "applied"), [("prefix", None), ("bidirectional", "causal")])
def test_states_follow_another_prefix(name, applied, checkpoints, pictures):
    """Of a model under another mask, too, which leaves the model that it comes from as it is."""
    mllm = probes.load(checkpoints[name])
    other = mllm.with_attention(applied) if applied else mllm
    pixels = mllm.preprocess(pictures)
    before = other(pixels)
    ids = mllm.prefix_ids[0].tolist()
    other.set_prefix([*ids, 5, 6, 7])
    states = other(pixels)
    assert other.prefix_ids[0].tolist() == [*ids, 5, 6, 7]
    assert int(other.is_image.nonzero()[0]) == len(ids) + 3
    if applied:
        assert mllm.prefix_ids[0].tolist() == ids
    else:
        whole = full_forward(other, pixels)
        assert_near(states["layer_02"], whole[2], 2)
    assert not torch.allclose(states["layer_02"], before["layer_02"], atol=1e-3)
    other.set_prefix(ids)
    assert all(torch.equal(x, before[site]) for site, x in other(pixels).items())


def test_subset_of_sites_gives_the_same_and_computes_no_more(mllm, pictures):
    pixels = mllm.preprocess(pictures)
    states = mllm.states(pixels)
    ran = []
    with ExitStack() as stack:
        for i, layer in enumerate(mllm.decoder.layers):
            hook = layer.register_forward_hook(lambda *_, i=i: ran.append(i))
            stack.callback(hook.remove)
        some = mllm.states(pixels, ["adapter", "layer_02"])
        mllm.states(pixels, ["encoder"])
    assert ran == [0, 1]
    assert list(some) == ["adapter", "layer_02"]
    assert all(torch.equal(some[site], states[site]) for site in some)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_attention_2", "ignores masks"),
        # it imports torch's compiler
        pytest.param("flex_attention", "has no mask as a tensor", marks=pytest.mark.slow),
    ],
)
def test_backends_that_take_no_masks_are_refused(checkpoints, backend, message):
    with pytest.raises(ValueError, match=f"'{backend}' {message}"):
        probes.load(checkpoints["causal"], attn_implementation=backend)


def test_revision_of_a_hub_id_is_resolved_and_recorded(checkpoints, tmp_path, monkeypatch):
    """A hub cache with two commits of a repository, of which `main` is one."""
    folder = tmp_path / "models--lab--llava"
    commits = {"main": "a" * 40, "old": "b" * 40}
    for (name, commit), attention in zip(commits.items(), ("causal", "prefix"), strict=True):
        shutil.copytree(checkpoints[attention], folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, commit, attention in (
        (None, "a", "causal"),
        ("old", "b", "prefix"),
        ("b" * 40, "b", "prefix"),
    ):
        mllm = probes.load("lab/llava", revision=revision)
        assert (mllm.revision, mllm.image_attention) == (commit * 40, attention)
    assert probes.load(checkpoints["causal"]).revision is None


def test_untrained_parts_are_drawn_by_seed_at_the_scale_of_the_training(
    checkpoints, pictures, tmp_path
):
    def load(path=checkpoints["causal"], **kwargs):
        return probes.load(path, untrained=["adapter", "llm"], **kwargs)

    trained = probes.load(checkpoints["causal"])
    pixels = trained.preprocess(pictures)
    kept, drawn, again, other = (m(pixels) for m in (trained, load(), load(), load(seed=1)))
    assert torch.equal(kept["encoder"], drawn["encoder"]), "the encoder is what it was"
    assert not torch.allclose(kept["adapter"], drawn["adapter"])
    assert all(torch.equal(drawn[site], again[site]) for site in drawn)
    assert not torch.allclose(drawn["layer_03"], other["layer_03"])
    scaled = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    (scaled / "training.json").write_text('{"adapter_init_scale": 4.0}')
    one, four = (load(path).model for path in (checkpoints["causal"], scaled))
    adapters = (model.model.multi_modal_projector.linear_2.weight for model in (one, four))
    assert torch.equal(4 * next(adapters), next(adapters))
    spread = one.model.language_model.layers[0].self_attn.q_proj.weight.std().item()
    assert spread == pytest.approx(one.config.get_text_config().initializer_range, rel=0.1)


def test_cls_token_dropped_from_an_encoder_without_one_is_noticed(checkpoints, pictures):
    broken = probes.load(checkpoints["causal"])
    broken.model.config.vision_feature_select_strategy = "full"  # keeps the CLS token
    with pytest.raises(ValueError, match=r"outputs 5 tokens per image of width 16; expected 4"):
        broken.states(broken.preprocess(pictures))
