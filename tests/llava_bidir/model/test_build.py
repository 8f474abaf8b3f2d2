"""Construction of a model: loaded weights, vocabulary, frozen parts, and errors for parts that do not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import ENCODERS, Encoder
from llava_bidir.model.export import as_llava


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


def test_adapter_of_stage_1_is_loaded(parts, checkpoints):
    adapter = build_model(
        *parts, build_processor(*parts), adapter=str(checkpoints["causal"])
    ).model.multi_modal_projector
    saved = load_file(checkpoints["causal"] / "model.safetensors")
    assert all(
        torch.equal(x, saved[f"model.multi_modal_projector.{name}"])
        for name, x in adapter.state_dict().items()
    )


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


@pytest.mark.parametrize(
    ("name", "config", "side"),
    [
        ("clip", CLIPVisionConfig(image_size=336, patch_size=14), 24),
        ("dinov2", Dinov2Config(image_size=518, patch_size=14), 24),
        ("dinov2_registers", Dinov2WithRegistersConfig(image_size=518, patch_size=14), 24),
        (
            "dinov3",
            DINOv3ViTConfig(
                image_size=224,
                patch_size=16,
                num_register_tokens=4,
            ),
            21,
        ),
        ("siglip", SiglipVisionConfig(image_size=384, patch_size=14), 27),
    ],
)
def test_grids_of_released_encoders(
    name,
    config,
    side,
    tmp_path,
):
    """24 x 24 at 336 px and 27 x 27 at 384 px (App. A.1)."""
    config.save_pretrained(tmp_path)
    encoder = Encoder(name, str(tmp_path))
    assert encoder.image_tokens(encoder.load_config()) == side**2


@pytest.mark.parametrize("name", ENCODERS)
def test_adapter_reads_each_patch_and_neither_cls_nor_registers(name, tmp_path):
    """With a small random encoder of the real class."""
    entry = ENCODERS[name]
    side = entry.image_px or 56
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 14,
    }
    registers = 2 * (name in ("dinov2_registers", "dinov3"))
    settings |= {"num_register_tokens": registers} if registers else {}
    config = entry.model_class.config_class(
        **settings,
        intermediate_size=32,
        image_size=side,
    )
    entry.model_class(config).save_pretrained(tmp_path / "encoder")
    _, llm = tiny_models.write_parts(tmp_path / "parts")
    encoder = Encoder(name, str(tmp_path / "encoder"))
    model = build_model(encoder, llm, build_processor(encoder, llm)).eval()
    pixels = torch.randn(1, 3, side, side)
    features = model.get_image_features(pixels).pooler_output[0]
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    patches = states[:, entry.has_cls + registers :]
    assert patches.shape[1] == model.config.image_seq_length == (side // 14) ** 2
    model.model.multi_modal_projector._forward_pre_hooks.clear()
    assert torch.equal(features, model.model.multi_modal_projector(patches)[0])
    if registers:
        with pytest.raises(ValueError, match="register tokens, which stock LLaVA would treat"):
            as_llava(model)
