"""Construction of a model: loaded weights, vocabulary, frozen parts, and errors for parts that do not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_models
import torch
from transformers import LlamaForCausalLM

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import Encoder


def test_parts_keep_their_weights_and_the_vocabulary_grows(parts):
    """As in LLaVA, the rows of added tokens are the mean of the LLM's; they must not depend on the seed."""
    built = build_model(*parts, build_processor(*parts))
    llm = LlamaForCausalLM.from_pretrained(parts[1])
    words = llm.config.vocab_size
    for module in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, module)().weight for model in (llm, built))
        assert len(new) % 64 == 0 and len(new) > words
        assert torch.equal(new[:words], old)
        assert torch.equal(new[words:], old.mean(0).expand(len(new) - words, -1))
    assert built.config.image_token_id == words, "<image> follows the LLM's own words"
    assert built.config.image_seq_length == tiny_models.TOKENS
    weights = built.model.language_model.state_dict()
    for name, weight in llm.model.state_dict().items():
        assert torch.equal(weights[name][: len(weight)], weight), name


def test_adapter_of_another_mask_or_encoder_is_rejected(parts, checkpoints, tmp_path):
    processor = build_processor(*parts)
    with pytest.raises(
        ValueError, match="has image_attention 'causal', this model 'bidirectional'"
    ):
        build_model(
            *parts, processor, adapter=str(checkpoints["causal"]), image_attention="bidirectional"
        )
    config = json.loads((checkpoints["causal"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(f"{parts[1]}/model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="Missing key.s. in state_dict: .linear_1.weight"):
        build_model(*parts, processor, adapter=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    with pytest.raises(ValueError, match="has vision_feature_layer -2, this model -1"):
        build_model(*parts, processor, adapter=str(tmp_path))


@pytest.mark.parametrize("layer", [0, 3, 99, -3])
def test_layer_that_the_encoder_lacks_is_an_error(layer, parts):
    message = rf"model.encoder.layer {layer}: .* has 2 layers; expected 1 to 2, or -2 to -1"
    with pytest.raises(ValueError, match=message):
        replace(parts[0], layer=layer).load_config()


def write_encoder(name: str, folder, side: int, **settings) -> Encoder:
    """Write a small random encoder of the real class."""
    model_class = Encoder(name, "unused").kind.model_cls
    config = model_class.config_class(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=14,
        image_size=side,
        **settings,
    )
    model_class(config).save_pretrained(folder / "encoder")
    return Encoder(name, str(folder / "encoder"))


@pytest.mark.parametrize(
    "name", ["clip", "dinov2", "dinov2_registers", "dinov3", "siglip", "metaclip_2"]
)
@torch.no_grad()
def test_states_at_another_side_are_those_of_the_stock_models_interpolation(name, parts, tmp_path):
    """`model.encoder.image_px`, where stored positions are a 4 x 4 grid."""
    encoder = replace(write_encoder(name, tmp_path, 56), image_px=70)
    model = build_model(encoder, parts[1], build_processor(encoder, parts[1])).eval()
    assert model.config.image_seq_length == 5**2
    pixels = torch.randn(2, 3, 70, 70)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    stock = load_weights("encoder", encoder.kind.model_cls, encoder.path).eval()
    interpolate = (
        {"interpolate_pos_encoding": True} if name in ("clip", "siglip", "metaclip_2") else {}
    )
    expected = stock(pixels, output_hidden_states=True, **interpolate).hidden_states[-2]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [225, 7])
def test_a_side_that_is_no_usable_multiple_of_the_patch_is_refused(side, tmp_path):
    encoder = replace(write_encoder("dinov2", tmp_path, 56), image_px=side)
    with pytest.raises(UserError, match=rf"image_px {side}: expected a multiple .*14 px"):
        encoder.load_config()
