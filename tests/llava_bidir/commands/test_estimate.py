"""The six configurations of the paper at full size, without weights: published shapes, counted parameters."""

import json

import pytest
import tiny_models
from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

from llava_bidir.cli import main
from llava_bidir.commands.estimate import _activation_bytes
from llava_bidir.rehearsal.published import SIZES, WORDS, llama_config, vision_settings

# Architectures as published; parameters are counted from them, so the checks below are against other people's numbers.
KINDS = {"clip": CLIPVisionConfig, "dinov2": Dinov2Config, "siglip": SiglipVisionConfig}
ENCODERS = {name: kind(**vision_settings(name, shrink=1)) for name, kind in KINDS.items()}
VICUNA = llama_config(SIZES["7b"].llm, WORDS)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, llama_tokenizer):
    folder = tmp_path_factory.mktemp("full")
    for name, config in ENCODERS.items():
        config.save_pretrained(folder / name)
    VICUNA.save_pretrained(folder / "vicuna")
    llama_tokenizer.save_pretrained(folder / "vicuna")
    return folder


def size(folder, stage, encoder, *more) -> list[str]:
    return ["estimate", "--json", "-c", f"configs/{stage}.yaml", "-c", f"configs/encoder/{encoder}.yaml"] + [
        *("--model.encoder.path", str(folder / encoder), "--model.llm", str(folder / "vicuna")),
        *("--data.annotations", "none.json", "--data.images", "none", *more),
    ]


@pytest.mark.parametrize(
    ("encoder", "image_attention"), [("clip", "causal"), ("dinov2", "bidirectional"), ("siglip", "causal")]
)
def test_configurations_at_full_size(encoder, image_attention, full_size, capsys):
    main(size(full_size, "stage2", encoder, "--model.image_attention", image_attention))
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    parameters, width = facts["parameters"], ENCODERS[encoder].hidden_size
    # Llama-2-7B has 6,738,415,616 parameters; <image> and <pad> widen both embeddings from 32000 to 32064 rows
    assert parameters["llm"] + parameters["lm_head"] == 6_738_415_616 + 2 * 64 * 4096
    assert parameters["adapter"] == width * 4096 + 4096 + 4096 * 4096 + 4096
    assert parameters["encoder"] == pytest.approx(
        {"clip": 303.5e6, "dinov2": 304.4e6, "siglip": 428e6}[encoder], rel=0.01
    )
    assert facts["trains"] == facts["total"] - parameters["encoder"]
    # 6 FLOPs for each parameter and token, attention and encoder on top
    dense = 6 * 6_607_077_376 * 2048 * 128
    assert 1.0 < facts["step_flops"] / dense < 1.12
    assert 14 * facts["total"] / 8e9 < facts["memory_gb"]["zero3"] < facts["memory_gb"]["zero2"]


def test_stage_1_trains_the_adapter_only(full_size, capsys):
    main(size(full_size, "stage1", "clip"))
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["trains"] == facts["parameters"]["adapter"] == 20_979_712


def test_estimate_is_readable_and_names_what_is_wrong(parts, conversations, capsys):
    argv = ["estimate", *tiny_models.training_arguments(parts, conversations)]
    main([*argv, "--devices", "2"])
    assert "train" in (text := capsys.readouterr().out) and "on each of 2 devices (estimate)" in text
    with pytest.raises(SystemExit, match="--length 3 leaves no text after 4 image tokens"):
        main([*argv, "--length", "3"])


def test_every_recomputed_layer_saves_memory():
    model = tiny_models.model()
    layers = model.config.text_config.num_hidden_layers
    by_layers = [_activation_bytes(model, samples=2, length=9, checkpointing=count) for count in range(layers + 1)]
    kept = by_layers[0] - by_layers[1]
    assert by_layers[:layers] == pytest.approx([by_layers[0] - count * kept for count in range(layers)]) and kept > 0
    assert by_layers[layers] > by_layers[layers - 1], "one layer at a time is recomputed, and has an input"
    assert _activation_bytes(model, 2, 9, False) == by_layers[0]
    words = model.config.text_config.vocab_size
    predictions = 2 * (9 - model.config.image_seq_length)
    assert by_layers[0] - _activation_bytes(model, 2, 9, False, 3) == 10 * (predictions - 3) * words
    assert by_layers[0] == _activation_bytes(model, 2, 9, False, 100)
    assert _activation_bytes(model, 2, 9, True) == by_layers[layers]


@pytest.mark.parametrize("option", ["--devices", "--length"])
def test_number_below_one_is_a_usage_error(option, full_size, capsys):
    """Zero devices divided by zero; length zero was read as none."""
    with pytest.raises(SystemExit) as stop:
        main(size(full_size, "stage1", "clip", option, "0"))
    assert stop.value.code == 2 and f"{option}: expected at least 1, got 0" in capsys.readouterr().err
