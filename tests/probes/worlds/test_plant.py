"""Planted models: ordinary checkpoints that have what they record."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.export import export_hf
from probes.worlds.plant import (
    MERGED,
    class_directions,
    encoder_states,
    name_model,
    plant_drop,
    plant_random,
    plant_recovery,
    read_pictures,
)


@pytest.fixture(scope="module")
def model(world):
    encoder = Encoder("clip", str(world / "encoder"), layer=-1)
    llm = str(world / "llm")
    processor = build_processor(encoder, llm)
    torch.manual_seed(0)
    net = build_model(encoder, llm, processor, image_attention="bidirectional")
    export_hf(net, processor, world.parent / "hf", {"llm": llm})
    return world.parent / "hf"


@pytest.fixture(scope="module")
def planted(world, model):
    losses = plant_recovery(model, world, world.parent / "planted", steps=12)
    return world.parent / "planted", losses


def test_loss_on_image_tokens_falls_and_the_checkpoint_is_an_ordinary_one(planted, model):
    folder, losses = planted
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    net = AutoModelForImageTextToText.from_pretrained(folder)
    before = AutoModelForImageTextToText.from_pretrained(model)
    assert net.config.image_attention == "bidirectional"
    changed = {
        name
        for name, weight in net.state_dict().items()
        if not torch.equal(weight, before.state_dict()[name])
    }
    assert not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert any("layers.2" in name for name in changed)
    assert not any("layers.3" in name for name in changed)  # it fetches answers


def test_questions_are_learned_along(planted, world, model):
    """Else the answers would be those of an untrained LLM: the loss counts both."""

    def head(folder):
        return AutoModelForImageTextToText.from_pretrained(folder).lm_head.weight

    assert torch.equal(head(planted[0]), head(model))
    losses = plant_recovery(
        model,
        world,
        world.parent / "asked",
        steps=0,
        answer_steps=2,
    )
    assert len(losses) == 2
    assert not torch.equal(head(world.parent / "asked"), head(model))


def test_a_random_llm_has_the_same_entries_in_other_places(planted, world):
    plant_random(planted[0], world.parent / "random", seed=3)
    before, after = (
        AutoModelForImageTextToText.from_pretrained(p)
        for p in (planted[0], world.parent / "random")
    )
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        in_layers = "language_model.layers" in name and old.ndim > 1
        assert torch.equal(old, new) != in_layers, name
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    training = read_json(world.parent / "random/training.json")
    assert training["name"] == "LLM shuffled"
    truth = training["truth"]
    assert {text for claims in truth.values() for text in claims.values()} == {"absent"}


@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_a_drop_makes_the_directions_of_its_pairs_equal_and_no_others(pairs, world, model):
    out = world.parent / f"drop{pairs}"
    plant_drop(model, world, out, pairs=pairs)
    before, after = (AutoModelForImageTextToText.from_pretrained(path) for path in (model, out))
    pixels, labels = read_pictures(world / "segmentation", "training")
    directions = class_directions(encoder_states(before, pixels), labels, MERGED)

    def first(net):
        return net.model.multi_modal_projector.linear_1.weight.detach()

    left = (directions @ first(after).T).norm(dim=1) / (directions @ first(before).T).norm(dim=1)
    assert (left[:pairs] < 1e-4).all()
    assert (left[pairs:] > 0.1).all()
    truth = "planted" if pairs else "absent"
    training = read_json(out / "training.json")
    assert training["truth"]["segmentation"]["adapter_drop"] == truth
    words = {0: "no pairs", 1: "one pair", 3: "three pairs"}
    assert training["name"] == ("adapter merged" if pairs else "adapter intact")
    assert training["about"] == f"adapter merges {words[pairs]} of classes"


def test_models_have_plain_names_of_what_was_planted_in_this_order():
    recovery = {"planted": "recovery"}
    drawn = {"planted": "random", "weights": "orthogonal"}
    drop = {"planted": "drop", "merged": MERGED[:2]}
    assert name_model([recovery]) == {"name": "trained", "about": "as trained"}
    both = "LLM drawn anew (orthogonal), adapter merges two pairs of classes"
    assert name_model([recovery, drawn, drop])["about"] == both


def test_bad_input_is_named(world, model, tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        plant_recovery(model, tmp_path, tmp_path / "out", steps=1)
