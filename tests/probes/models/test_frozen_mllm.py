"""States of a frozen MLLM: read at the right places, blind to what they should not see, and up to date."""

import json
import shutil

import pytest
import tiny_models
import torch
from tolerances import rounding

import probes

pytestmark = pytest.mark.numerics


def full_forward(mllm, pixels, suffix: int = 0):
    """Hidden states of the whole model on prefix + image + `suffix` text tokens, at the image's positions."""
    image = torch.full((len(pixels), tiny_models.TOKENS), mllm.model.config.image_token_id)
    text = torch.arange(3, 3 + suffix).expand(len(pixels), -1)
    ids = torch.cat([mllm.prefix_ids.expand(len(pixels), -1), image, text], 1)
    states = mllm.model(ids, pixels, output_hidden_states=True, use_cache=False).hidden_states
    start = mllm.prefix_ids.shape[1]
    return [state[:, start : start + tiny_models.TOKENS] for state in states]


def test_states_equal_those_of_the_full_forward(mllm, pictures):
    pixels = mllm.preprocess(pictures)
    states = mllm(pixels)
    whole = full_forward(mllm, pixels)
    assert torch.equal(states["adapter"], whole[0]), (
        "the adapter site is the LLM's input, bit for bit"
    )
    for i in (1, 2):
        torch.testing.assert_close(states[f"layer_{i:02d}"], whole[i], **rounding(whole[i], i))
    torch.testing.assert_close(states["final_norm"], whole[3], **rounding(whole[3], 4))
    norm = mllm.model.model.language_model.norm
    (
        torch.testing.assert_close(norm(states["layer_03"]), states["final_norm"]),
        "layer 3 is read before the norm",
    )
    assert torch.equal(
        mllm.to_grid(states["layer_03"])[:, 1, 0], states["layer_03"][:, tiny_models.GRID[1]]
    )
    tower = mllm.model.model.vision_tower(pixels, output_hidden_states=True)
    assert torch.equal(states["encoder"], tower.hidden_states[-1][:, 1:])


def test_states_follow_another_prefix(mllm, checkpoints, pictures):
    other = probes.load(str(checkpoints[mllm.image_attention]))
    pixels = mllm.preprocess(pictures)
    before = other(pixels)
    ids = other.prefix_ids[0].tolist()
    other.set_prefix(ids + [5, 6, 7])
    states = other(pixels)
    whole = full_forward(other, pixels)
    assert other.prefix_ids[0].tolist() == ids + [5, 6, 7]
    assert int(other.is_image.nonzero()[0]) == len(ids) + 3
    for i in (1, 2):
        torch.testing.assert_close(states[f"layer_{i:02d}"], whole[i], **rounding(whole[i], i))
        assert not torch.allclose(states[f"layer_{i:02d}"], before[f"layer_{i:02d}"], atol=1e-3)
    other.set_prefix(ids)
    assert all(torch.equal(x, before[site]) for site, x in other(pixels).items())


def test_another_prefix_of_a_model_under_another_mask_is_its_own(mllm, checkpoints, pictures):
    own = probes.load(str(checkpoints[mllm.image_attention]))
    pixels = mllm.preprocess(pictures)
    before = own(pixels)
    ids = own.prefix_ids[0].tolist()
    other = own.with_attention("causal")
    other.set_prefix(ids + [5, 6, 7])
    assert other.prefix_ids.shape[1] == len(ids) + 3
    assert own.prefix_ids[0].tolist() == ids
    assert all(torch.equal(x, before[site]) for site, x in own(pixels).items())


def test_logit_lens_takes_states_of_another_precision(checkpoints, pictures):
    mllm = probes.load(str(checkpoints["causal"]), dtype="bfloat16")
    states = mllm.states(mllm.preprocess(pictures))
    logits = mllm.logit_lens(states)
    assert list(logits) == mllm.sites[1:], "all but the encoder's"
    in_float = {site: states[site].float() for site in logits}
    assert all(torch.equal(x, logits[site]) for site, x in mllm.logit_lens(in_float).items())


def test_subset_of_sites_gives_the_same_and_computes_no_more(mllm, pictures):
    pixels = mllm.preprocess(pictures)
    states = mllm.states(pixels)
    ran = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(mllm.decoder.layers)
    ]
    try:
        some = mllm.states(pixels, ["adapter", "layer_02"])
        assert ran == [0, 1]
        ran.clear()
        mllm.states(pixels, ["encoder"])
        assert ran == []
    finally:
        [hook.remove() for hook in hooks]
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
        probes.load(str(checkpoints["causal"]), attn_implementation=backend)


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
    assert probes.load(str(checkpoints["causal"])).revision is None


def test_images_are_resized_as_the_checkpoint_does(checkpoints, tmp_path):
    shutil.copytree(checkpoints["causal"], tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    for resize in ("pad", "center_crop"):
        (tmp_path / "ours/config.json").write_text(json.dumps(config | {"image_resize": resize}))
        assert probes.load(str(tmp_path / "ours")).geometry.resize == resize
    assert probes.load(str(tmp_path / "ours"), image_resize="squash").geometry.resize == "squash"


def test_untrained_adapter_has_the_scale_of_the_training(checkpoints, tmp_path):
    shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    (tmp_path / "hf/training.json").write_text('{"adapter_init_scale": 4.0}')
    one, four = (
        probes.load(str(path), untrained=["adapter"])
        for path in (checkpoints["causal"], tmp_path / "hf")
    )
    one, four = (mllm.model.model.multi_modal_projector.linear_2.weight for mllm in (one, four))
    assert torch.equal(4 * one, four)


def test_untrained_parts_are_drawn_anew_by_seed(checkpoints, pictures):
    def load(**kwargs):
        return probes.load(str(checkpoints["causal"]), **kwargs)

    trained = load()
    control = load(untrained=["adapter", "llm"])
    again = load(untrained=["adapter", "llm"])
    other = load(untrained=["adapter", "llm"], seed=1)
    pixels = trained.preprocess(pictures)
    states = [m.states(pixels) for m in (trained, control, again, other)]
    assert torch.equal(states[0]["encoder"], states[1]["encoder"]), "the encoder is what it was"
    assert not torch.allclose(states[0]["adapter"], states[1]["adapter"])
    assert all(torch.equal(states[1][site], states[2][site]) for site in trained.sites)
    assert not torch.allclose(states[1]["layer_03"], states[3]["layer_03"])
    spread = control.model.model.language_model.layers[0].self_attn.q_proj.weight.std().item()
    assert spread == pytest.approx(
        control.model.config.get_text_config().initializer_range, rel=0.1
    )


def test_stays_frozen_and_in_eval_mode(mllm):
    assert not any(module.training for module in mllm.modules())
    mllm.train()
    assert not mllm.training
    assert not any(module.training for module in mllm.modules())
    assert not any(parameter.requires_grad for parameter in mllm.parameters())


def test_a_prefix_with_the_images_placeholder_is_an_error(mllm):
    with pytest.raises(ValueError, match="prefix contains the image's placeholder"):
        mllm.set_prefix([3, mllm.model.config.image_token_id])


def test_cls_token_dropped_from_an_encoder_without_one_is_noticed(checkpoints, pictures):
    broken = probes.load(str(checkpoints["causal"]))
    broken.model.config.vision_feature_select_strategy = (
        "full"  # keeps the CLS token: 5 tokens for 4 patches
    )
    with pytest.raises(
        ValueError,
        match=r"outputs 5 tokens per image of width 16; expected 4 for the grid \(2, 2\)",
    ):
        broken.states(broken.preprocess(pictures))
