"""Putting the parts together: what is loaded, padded_vocab_size, frozen, and what does not fit."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
)

from llava_bidir.model.build import build_model, build_processor, set_trainable
from llava_bidir.model.encoders import ENCODERS, Encoder


@pytest.fixture
def built(parts):
    return build_model(*parts, build_processor(*parts), image_attention="bidirectional")


def test_parts_keep_their_weights_and_the_vocabulary_grows(parts, built):
    llm = LlamaForCausalLM.from_pretrained(parts[1])
    words = llm.config.vocab_size
    embeddings = built.get_input_embeddings().weight
    assert torch.equal(embeddings[:words], llm.get_input_embeddings().weight)
    assert len(embeddings) % 64 == 0 and len(embeddings) > words
    assert built.config.image_token_id == words, "<image> follows the LLM's own words"
    assert built.config.image_seq_length == tiny_models.TOKENS and built.config.image_attention == "bidirectional"
    assert torch.equal(built.model.language_model.layers[0].mlp.up_proj.weight, llm.model.layers[0].mlp.up_proj.weight)


def test_new_adapter_follows_the_seed_and_its_gain(parts):
    processor = build_processor(*parts)

    def adapter(**kwargs):
        torch.manual_seed(5)
        return build_model(*parts, processor, **kwargs).model.multi_modal_projector

    one, four = adapter(), adapter(adapter_gain=4.0)
    assert torch.equal(one.linear_2.weight * 4, four.linear_2.weight)
    assert torch.equal(one.linear_1.weight, four.linear_1.weight)


@pytest.mark.parametrize(("train", "moving"), [(["adapter"], {"multi_modal_projector"}), (["adapter", "llm"], None)])
def test_set_trainable_never_trains_the_encoder(built, train, moving):
    counts = set_trainable(built, train)
    trained = {name for name, p in built.named_parameters() if p.requires_grad}
    assert sum(counts.values()) == sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert not any("vision_tower" in name for name in trained)
    assert any("multi_modal_projector" in name for name in trained)
    assert any("language_model" in name for name in trained) == ("llm" in train)
    for bad in ([], ["encoder"]):
        with pytest.raises(ValueError, match="model.trainable must be some of adapter, llm"):
            set_trainable(built, bad)


def test_adapter_of_stage_1_is_taken_over(parts, checkpoints):
    model = build_model(*parts, build_processor(*parts), adapter=str(checkpoints["causal"]))
    from safetensors.torch import load_file

    saved = load_file(checkpoints["causal"] / "model.safetensors")
    assert torch.equal(
        model.model.multi_modal_projector.linear_1.weight, saved["multi_modal_projector.linear_1.weight"]
    )


def test_adapter_of_another_mask_or_encoder_is_refused(parts, checkpoints, tmp_path):
    processor = build_processor(*parts)
    with pytest.raises(ValueError, match="image_attention is 'causal' there and 'bidirectional' here"):
        build_model(*parts, processor, adapter=str(checkpoints["causal"]), image_attention="bidirectional")
    config = json.loads((checkpoints["causal"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"contains no weights: neither \*.safetensors nor"):
        build_model(*parts, processor, adapter=str(tmp_path))
    shutil.copy(f"{parts[1]}/model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="holds no tensor named multi_modal_projector"):
        build_model(*parts, processor, adapter=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    with pytest.raises(ValueError, match="vision_feature_layer is -2 there and -1 here"):
        build_model(*parts, processor, adapter=str(tmp_path))


def test_unknown_or_mistaken_encoder_is_named(parts):
    with pytest.raises(ValueError, match="unknown encoder 'clop'; registered: clip, dinov2, dinov2_registers, siglip"):
        Encoder("clop", parts[0].path)
    with pytest.raises(ValueError, match="is a 'clip_vision_model' checkpoint, but name 'siglip'"):
        Encoder("siglip", parts[0].path).load_config()
    with pytest.raises(ValueError, match="unknown image_resize 'stretch'"):
        build_processor(*parts, image_resize="stretch")


@pytest.mark.parametrize(
    ("name", "config", "grid"),
    [
        ("clip", CLIPVisionConfig(image_size=336, patch_size=14), (24, 24)),
        ("dinov2", Dinov2Config(image_size=518, patch_size=14), (24, 24)),
        ("dinov2_registers", Dinov2WithRegistersConfig(image_size=518, patch_size=14), (24, 24)),
        ("siglip", SiglipVisionConfig(image_size=384, patch_size=14), (27, 27)),
    ],
)
def test_grids_of_released_encoders(name, config, grid, tmp_path):
    """24 x 24 at 336 px and 27 x 27 at 384 px (App. A.1); their entries say how many registers they have."""
    config.save_pretrained(tmp_path)
    encoder = Encoder(name, str(tmp_path))
    assert encoder.grid(encoder.load_config()) == grid


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_entry_gives_one_token_a_patch(name, tmp_path):
    """A small random tower of the real class: neither a CLS token too many nor a patch too few."""
    entry = ENCODERS[name]
    side = entry.image_px or 56
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
    settings |= {"num_register_tokens": entry.extra_tokens - 1} if entry.extra_tokens > 1 else {}
    config = entry.config_class(**settings, intermediate_size=32, image_size=side)
    entry.model_class(config).save_pretrained(tmp_path / "encoder")
    _, llm = tiny_models.write_parts(tmp_path / "parts")
    encoder = Encoder(name, str(tmp_path / "encoder"))
    model = build_model(encoder, llm, build_processor(encoder, llm)).eval()
    rows, columns = encoder.grid(config)
    features = model.get_image_features(torch.randn(1, 3, side, side)).pooler_output
    assert features[0].shape == (rows * columns, 32) and model.config.image_seq_length == rows * columns


def test_image_processor_pads_with_the_mean_or_crops_the_centre(parts):
    import numpy as np
    from PIL import Image

    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, :4] = wide[:, 12:] = 255
    entry = ENCODERS["clip"]
    for aspect in ("pad", "center_crop"):
        processor = build_processor(*parts, image_resize=aspect).image_processor
        pixels = processor(Image.fromarray(wide), return_tensors="pt")["pixel_values"][0]
        assert pixels.shape == (3, 8, 8)
        raw = pixels * torch.tensor(entry.std)[:, None, None] + torch.tensor(entry.mean)[:, None, None]
        if aspect == "pad":  # bands of the mean colour above and below
            assert torch.allclose(raw[:, 0], torch.tensor([122, 116, 104])[:, None] / 255, atol=0.02)
        else:  # the white sides are gone
            assert raw[:, 4, 3:5].max() < 0.1


def test_a_checkpoint_that_is_nowhere_is_named_with_its_config_key(parts, tmp_path):
    with pytest.raises(ValueError, match=r"model\.llm: '.*nowhere' is neither a checkpoint directory"):
        build_processor(parts[0], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"model\.encoder\.path: 'no/such' is neither a checkpoint directory"):
        Encoder("clip", "no/such").load_config()


@pytest.mark.parametrize("name", [name for name, entry in ENCODERS.items() if entry.extra_tokens > 1])
def test_registers_never_reach_the_adapter(name, tmp_path):
    """[CLS, 4 registers, patches]. Dropping CLS alone would take registers for patches."""
    from llava_bidir.model.hf_export import as_llava

    entry = ENCODERS[name]
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": entry.image_px}
    config = entry.config_class(**settings, patch_size=14, num_register_tokens=entry.extra_tokens - 1)
    entry.model_class(config).save_pretrained(tmp_path / "encoder")
    _, llm = tiny_models.write_parts(tmp_path / "parts")
    encoder = Encoder(name, str(tmp_path / "encoder"))
    model = build_model(encoder, llm, build_processor(encoder, llm)).eval()
    pixels, (rows, columns) = torch.randn(1, 3, entry.image_px, entry.image_px), encoder.grid(config)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    model.model.multi_modal_projector._forward_pre_hooks.clear()
    expected = model.model.multi_modal_projector(states[:, entry.extra_tokens :])
    again = build_model(encoder, llm, build_processor(encoder, llm)).eval()
    again.load_state_dict(model.state_dict())
    assert states.shape[1] == entry.extra_tokens + rows * columns
    assert torch.equal(again.get_image_features(pixels).pooler_output[0], expected[0])
    with pytest.raises(ValueError, match="register tokens, which a stock llava would take for patches"):
        as_llava(model)


def test_an_encoder_with_other_registers_than_its_entry_is_refused(tmp_path):
    """Before a large model is loaded for nothing: its tokens would not be as many as the grid has."""
    config = ENCODERS["dinov2_registers"].config_class(num_register_tokens=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 2 register tokens, but name 'dinov2_registers' stands for 4"):
        Encoder("dinov2_registers", str(tmp_path)).load_config()


def test_an_llm_of_another_family_is_a_path_away(parts, tmp_path):
    """Qwen2: other class, other config, biases in its attention; and Eq. 2 holds."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    encoder, llama = parts
    shutil.copytree(llama, tmp_path / "qwen")
    words = LlamaForCausalLM.from_pretrained(llama).config.vocab_size
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2ForCausalLM(Qwen2Config(**settings, num_key_value_heads=2, vocab_size=words)).save_pretrained(
        tmp_path / "qwen"
    )
    processor = build_processor(encoder, str(tmp_path / "qwen"))
    moved = {}
    for mask in ("causal", "bidirectional"):
        torch.manual_seed(0)
        model = build_model(encoder, str(tmp_path / "qwen"), processor, image_attention=mask).eval()
        tiny_models.sharpen(model)
        ids = torch.tensor([[3, *[model.config.image_token_id] * tiny_models.TOKENS, 4]])

        def states(bump, model=model, ids=ids):
            def push(module, args, output):
                return torch.cat([output[:, :-1], output[:, -1:] + bump], 1)

            hook = model.model.multi_modal_projector.register_forward_hook(push)
            try:
                return model(
                    input_ids=ids, pixel_values=tiny_models.pixels(1), output_hidden_states=True
                ).hidden_states[1]
            finally:
                hook.remove()

        moved[mask] = (states(5.0) - states(0.0)).abs().amax(-1)[0, 1].item()
    assert model.config.text_config.model_type == "qwen2" and moved["causal"] == 0 and moved["bidirectional"] > 1e-4


def test_a_tokenizer_may_lie_by_itself(parts, tmp_path):
    """To look at data one needs no LLM."""
    for file in Path(parts[1]).iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    processor = build_processor(parts[0], str(tmp_path))
    assert processor.tokenizer("the sky").input_ids and not (tmp_path / "config.json").exists()
