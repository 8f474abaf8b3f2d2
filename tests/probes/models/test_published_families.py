"""The numbers of every family's published configs, with their sources."""

from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, PreTrainedConfig

from probes.models.families import FAMILIES, family_of, own_image_attention
from probes.models.families.encoders import ENCODERS
from probes.models.read_config import check_numbers

PUBLISHED = yaml.safe_load((Path(__file__).parent / "published_families.yaml").read_text())
MODELS = PUBLISHED["models"]


def config_of(entry: dict) -> PreTrainedConfig:
    encoder = PUBLISHED["encoders"][entry["encoder"]]
    llm = PUBLISHED["llms"][entry["llm"]]
    vision = dict(encoder["config"])
    text = dict(llm["config"])
    further = entry.get("config", {})
    if "period" in llm:
        text["layer_types"] = llm["period"] * (text["num_hidden_layers"] // len(llm["period"]))
        further = {"audio_config": None}
    return AutoConfig.for_model(entry["family"], vision_config=vision, text_config=text, **further)


def test_every_family_has_a_published_model():
    """Bare encoders have no published table of their own: test_frozen_encoder.py compares them with stock models."""
    assert {entry["family"] for entry in MODELS.values()} == FAMILIES.keys() - ENCODERS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_a_config(name):
    """At the published depth, without a model."""
    entry = MODELS[name]
    config = config_of(entry)
    family = family_of(config)
    check_numbers(name, family, config)
    assert family.grid(config) == (entry["side"],) * 2
    assert family.image_px(config) == entry["image_px"]
    assert family.encoder_width(config) == entry["encoder_width"]
    assert family.covered_px(config) == entry.get("covered_px", entry["image_px"])
    assert own_image_attention(config) == entry.get("image_attention", "causal")


@pytest.mark.parametrize("name", PUBLISHED["refused"])
def test_unreadable_configs_are_refused(name):
    config = config_of(PUBLISHED["refused"][name])
    with pytest.raises(ValueError, match=PUBLISHED["refused"][name]["message"]):
        check_numbers(name, family_of(config), config)
