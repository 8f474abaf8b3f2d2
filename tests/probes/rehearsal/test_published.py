"""Inputs of a rehearsal: random models in published layouts, which the project's and transformers' own loaders read."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder
from probes.rehearsal.published import (
    SIZES,
    write_encoder,
    write_llava_hf,
    write_vicuna,
)

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "vicuna"
    write_vicuna(TINY.llm, folder)
    return folder


@pytest.mark.parametrize(("name", "tokens"), [("clip", 576), ("dinov2", 576), ("siglip", 729)])
def test_encoder_and_sharded_pickled_llm_make_a_model_of_the_published_grid(
    name,
    tokens,
    vicuna,
    tmp_path,
):
    write_encoder(name, TINY.encoders_shrink, tmp_path / name)
    encoder = Encoder(name, str(tmp_path / name))
    processor = build_processor(encoder, str(vicuna))
    model = build_model(encoder, str(vicuna), processor)
    assert model.config.image_seq_length == tokens
    assert processor.image_token_id == 32000
    assert model.get_input_embeddings().num_embeddings == 32064
    assert (
        len(
            {
                *json.loads((vicuna / "pytorch_model.bin.index.json").read_text())[
                    "weight_map"
                ].values()
            }
        )
        == 3
    )
    assert len([*vicuna.glob("pytorch_model-*-of-00003.bin")]) == 3
    assert not (vicuna / "tokenizer.json").exists()


def test_llava_hf_has_old_names_in_three_shards_and_loads_in_transformers(vicuna, tmp_path):
    write_llava_hf(TINY.llm, TINY.encoders_shrink, vicuna, tmp_path / "hf")
    names = set()
    for file in (tmp_path / "hf").glob("model-*-of-00003.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= {*tensors.keys()}
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}
    assert {"language_model.lm_head.weight", "language_model.model.norm.weight"} < names
    assert {
        "multi_modal_projector.linear_1.weight",
        "vision_tower.vision_model.pre_layrnorm.weight",
    } < names
    model, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values())
    assert model.config.image_token_id == 32000
    processor = LlavaProcessor.from_pretrained(tmp_path / "hf")
    template = json.loads((tmp_path / "hf/chat_template.json").read_text())["chat_template"]
    assert processor.chat_template == template
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 32000
    weights = model.state_dict()
    assert not torch.equal(
        *(weights[f"model.language_model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    )
