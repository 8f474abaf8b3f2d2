"""Planted models: ordinary checkpoints that have what they record."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from llava_bidir.common.errors import UserError
from llava_bidir.common.files import read_json
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from llava_bidir.model.export import export_hf
from probes.config import AssetsOptions
from probes.worlds import assets, binding
from probes.worlds.dialogues import LOOK_ALIKE
from probes.worlds.plant import (
    MERGED,
    class_directions,
    encoder_states,
    plant_drop,
    plant_random,
    plant_recovery,
    read_pictures,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Return a folder of pictures of two scenes, written in this process: a new one takes longer to start."""
    out = tmp_path_factory.mktemp("world") / "assets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
        patch.setattr(binding, "POOL", 12)
        assets.run(AssetsOptions(out=out, seed=1, scale=0.01, scenes=2))
    return out


def test_questions_of_the_world_are_about_look_alikes(world):
    questions = json.loads((world / "questions.json").read_text())
    names = [question["regions"][0]["class"] for question in questions]
    assert names
    assert not [name for name in names if LOOK_ALIKE[name] == name]


@pytest.fixture(scope="module")
def model(world):
    encoder = Encoder("clip", str(world / "encoder"), layer=-1)
    llm = str(world / "llm")
    processor = build_processor(encoder, llm)
    torch.manual_seed(0)
    net = build_model(encoder, llm, processor, image_attention="bidirectional")
    export_hf(net, processor=processor, out=world.parent / "hf", training={"llm": llm})
    return world.parent / "hf"


@pytest.fixture(scope="module")
def planted(world, model):
    losses = plant_recovery(model, world, world.parent / "planted", steps=12)
    return world.parent / "planted", losses


def load(path: Path):
    return AutoModelForImageTextToText.from_pretrained(path)


def test_loss_on_image_tokens_falls_and_the_checkpoint_is_an_ordinary_one(planted, model):
    folder, losses = planted
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < 0.8 * losses[0]
    net = load(folder)
    before = load(model).state_dict()
    assert net.config.image_attention == "bidirectional"
    changed = [n for n, weight in net.state_dict().items() if not torch.equal(weight, before[n])]
    parts = ("vision_tower", "multi_modal_projector", "layers.2", "layers.3", "lm_head")
    # layer 3 fetches answers
    expected = [False, True, True, False, False]
    assert [any(part in name for name in changed) for part in parts] == expected


def test_questions_are_learned_along(world, model):
    """Else the answers would be those of an untrained LLM: the loss counts both."""
    out = world.parent / "asked"
    losses = plant_recovery(model, world, out, steps=0, answer_steps=2)
    assert len(losses) == 2
    assert not torch.equal(load(out).lm_head.weight, load(model).lm_head.weight)


def test_a_random_llm_has_the_same_entries_in_other_places(planted, world):
    out = world.parent / "random"
    plant_random(planted[0], out, seed=3)
    after = load(out)
    for (name, old), new in zip(
        load(planted[0]).named_parameters(), after.parameters(), strict=True
    ):
        in_layers = "language_model.layers" in name and old.ndim > 1
        assert torch.equal(old, new) != in_layers, name
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)
    truth = read_json(out / "training.json")["truth"]
    assert {text for claims in truth.values() for text in claims.values()} == {"absent"}


@pytest.mark.parametrize("pairs", [0, 2])
def test_a_drop_makes_the_directions_of_its_pairs_equal_and_no_others(pairs, world, model):
    out = world.parent / f"drop{pairs}"
    plant_drop(model, world, out, pairs=pairs)
    before = load(model)
    pixels, labels = read_pictures(world / "segmentation", "training")
    directions = class_directions(encoder_states(before, pixels), labels, MERGED)
    found, original = (
        (directions @ net.model.multi_modal_projector.linear_1.weight.T).norm(dim=1)
        for net in (load(out), before)
    )
    left = found / original
    assert (left[:pairs] < 1e-4).all()
    assert (left[pairs:] > 0.1).all()
    truth = read_json(out / "training.json")["truth"]["segmentation"]["adapter_drop"]
    assert truth == ("planted" if pairs else "absent")


def test_bad_input_is_named(world, model, tmp_path):
    with pytest.raises(UserError, match="holds no pictures"):
        plant_recovery(model, tmp_path, tmp_path / "out", steps=1)
