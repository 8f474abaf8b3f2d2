"""Exports of `--as-llava` in transformers 4.57.6, with which much software of others still reads them."""

import os
import shutil
import sys

import older_transformers
import pytest
import tiny_models
import torch
from processes import run_command
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
)

from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.encoders import ENCODERS, Encoder
from llava_bidir.model.export import as_llava, export_hf

VERSION = "4.57.6"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLMS = {
    "llama": LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "mistral": MistralConfig(**SIZES, sliding_window=6),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        },
    ),
    "phi3": Phi3Config(
        **SIZES,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ),
}


def write_encoder(name: str, folder) -> Encoder:
    """Write a tiny random encoder of a family."""
    entry = ENCODERS[name]
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = entry.config_class(**settings, intermediate_size=32, patch_size=4, image_size=8)
    entry.model_class(config).save_pretrained(folder)
    return Encoder(name, str(folder), image_px=8)


def write_export(folder, encoder: Encoder, llm: str, config):
    """Export a tiny random LLaVA with the stock class."""
    llm = str(shutil.copytree(llm, folder / "llm"))
    if config is not None:
        config.vocab_size = LlamaConfig.from_pretrained(llm).vocab_size
        AutoModelForCausalLM.from_config(config).save_pretrained(llm)
    processor = build_processor(encoder, llm)
    model = build_model(encoder, llm, processor)
    tiny_models.sharpen(model, 8.0)
    export_hf(as_llava(model), processor, folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """Return the folder of an older transformers, to be found before ours; torch is that of this environment."""
    folder = tmp_path_factory.mktemp("transformers")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", folder]
    done = run_command([*pip, f"transformers=={VERSION}"], must_pass=False)
    if done.returncode:
        pytest.skip(f"transformers {VERSION} cannot be installed: {done.stderr[-300:]}")
    return folder


@pytest.mark.nightly
def test_an_older_transformers_answers_as_ours_does(parts, older, tmp_path):
    torch.manual_seed(0)
    exports = [write_export(tmp_path / name, *parts, config) for name, config in LLMS.items()]
    for name in ("siglip", "dinov2"):
        encoder = write_encoder(name, tmp_path / f"{name}_encoder")
        exports.append(write_export(tmp_path / name, encoder, parts[1], None))
    out = tmp_path / "answers.pt"
    script = older_transformers.__file__
    environment = os.environ | {"PYTHONPATH": str(older)}
    run_command([sys.executable, script, VERSION, out, *exports], env=environment)
    for export, theirs in torch.load(out).items():
        ours = older_transformers.answer(export, export == str(exports[0]))
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():
            assert torch.allclose(theirs[name], value, rtol=1e-5, atol=1e-5), (export, name)
