"""Checkpoints that transformers would complete by its defaults or read in part are refused, wherever they are read."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

import probes
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import load_weights, read_model_config
from llava_bidir.model.build import build_model, build_processor
from probes.cli import main as probes_main

AUTHORS = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "vocab_size": 32000,
}


def write(folder, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_the_authors_format_is_refused(kind, tmp_path):
    """`probes sites` described 40 layers of width 5120 as 32 of 4096."""
    path = write(tmp_path, AUTHORS | {"model_type": kind})
    with pytest.raises(SystemExit, match="conversion to|does not recognize this architecture"):
        probes_main(["sites", path])


def config_of(name: str, folder) -> dict:
    """Write the config of a tiny model, as transformers writes it."""
    settings = dict(tiny_families.STOCK[name].config)
    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", sorted(tiny_families.STOCK))
def test_a_config_without_a_part_is_refused_for_every_family(name, tmp_path):
    whole = config_of(name, tmp_path)
    assert read_model_config("MLLM", str(tmp_path)).model_type == whole["model_type"]
    for part in ("vision_config", "text_config"):
        path = write(tmp_path, {key: value for key, value in whole.items() if key != part})
        message = f"config.json has no {part}, for which|config.json of .*: it has no {part}"
        with pytest.raises(SystemExit, match=message):
            probes_main(["sites", path])


def test_an_early_config_with_the_llm_beside_the_encoder_is_read(tmp_path):
    """Qwen2-VL's has no text_config; its numbers are those of the LLM."""
    whole = config_of("qwen2_vl", tmp_path)
    text = whole.pop("text_config")
    flat = {key: value for key, value in text.items() if key != "model_type"}
    llm_config = read_model_config("MLLM", write(tmp_path, flat | whole)).get_text_config()
    assert llm_config.num_hidden_layers == text["num_hidden_layers"]


def test_auto_processor_finds_the_processor_by_the_config_without_asking(
    checkpoints, tmp_path, monkeypatch
):
    """Importing the model class has registered it; transformers would ask whether to run an export's code."""
    monkeypatch.setattr("builtins.input", lambda prompt="": pytest.fail(f"asked: {prompt}"))
    assert isinstance(AutoProcessor.from_pretrained(checkpoints["causal"]), LlavaProcessor)
    path = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((path / name).read_text())
        settings.pop("processor_class", None)
        (path / name).write_text(json.dumps(settings))
    assert isinstance(AutoProcessor.from_pretrained(path), LlavaProcessor)


def add_tensors(folder, part: str, ends: tuple[str, ...], prefix: str = "") -> str:
    """Add tensors beside the first weight whose name contains `part`; return the first of their names."""
    tensors = load_file(folder / "model.safetensors")
    weights = [name for name in tensors if part in name and name.endswith(".weight")]
    layer = min(weights).removesuffix(".weight")
    added = {f"{prefix}{layer}.{end}": torch.ones(4) for end in ends}
    save_file(tensors | added, folder / "model.safetensors", {"format": "pt"})
    return min(added)


LORA = ("lora_A.weight", "lora_B.weight")
Q_PROJ = "language_model.layers.0.self_attn.q_proj"
UNMERGED = {  # the part whose weight has others beside it, their ends, and the prefix of their names
    "unmerged LoRA": (Q_PROJ, ("lora_A.default.weight", "lora_B.default.weight")),
    "of peft": (Q_PROJ, LORA, "base_model.model."),
    "GPTQ and AWQ": (Q_PROJ, ("qweight", "qzeros", "scales", "g_idx")),
    "a bias that the config denies": (Q_PROJ, ("bias",)),
    "in the adapter": ("multi_modal_projector.linear_1", LORA),
    "in the encoder": ("vision_tower.vision_model.encoder.layers.0.self_attn.q_proj", LORA),
}


@pytest.mark.parametrize("kind", UNMERGED)
def test_tensors_of_other_layers_than_the_models_are_refused_by_name(kind, checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    name = add_tensors(folder, *UNMERGED[kind])
    name = name.replace(".vision_model.", ".")  # as transformers reads it
    message = f"MLLM: .*hf has updates, .*{len(UNMERGED[kind][1])} tensors, e.g. {re.escape(name)};"
    with pytest.raises(UserError, match=f"{message}.*merge"):
        probes.load(str(folder))


@pytest.mark.parametrize("part", ["llm", "encoder"])
def test_they_are_refused_in_the_parts_of_a_new_model(part, parts, tmp_path):
    folder = shutil.copytree(parts[1] if part == "llm" else parts[0].path, tmp_path / part)
    name = add_tensors(folder, "layers.0.self_attn.q_proj", LORA)
    new = {
        "llm": (parts[0], str(folder)),
        "encoder": (replace(parts[0], path=str(folder)), parts[1]),
    }[part]
    with pytest.raises(UserError, match=f"model.{part}.*e.g. {re.escape(name)}"):
        build_model(*new, build_processor(*new))


def test_tensors_of_modules_that_the_model_lacks_are_left_out(parts, tmp_path):
    """A complete CLIP has a text model, which its encoder does not need, and buffers in files of earlier versions."""
    folder = shutil.copytree(parts[0].path, tmp_path / "encoder")
    tensors = load_file(folder / "model.safetensors")
    others = {
        "text_model.embeddings.token_embedding.weight": torch.ones(3, 3),
        "logit_scale": torch.ones(1),
        "visual_projection.weight": torch.ones(2, 2),
        "vision_model.embeddings.position_ids": torch.arange(5),
    }
    save_file(tensors | others, folder / "model.safetensors", {"format": "pt"})
    assert load_weights("encoder", parts[0].kind.model_cls, str(folder))


def test_updates_of_peft_are_refused_at_every_door(checkpoints, parts, tmp_path):
    """transformers puts them into the model as layers of their own."""
    hf = shutil.copytree(checkpoints["causal"], tmp_path / "hf")
    llm = shutil.copytree(parts[1], tmp_path / "llm")
    for folder in (hf, llm):
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    doors = {
        "MLLM": lambda: probes.load(str(hf)),
        "model.llm": lambda: build_model(parts[0], str(llm), build_processor(parts[0], str(llm))),
        "model.adapter": lambda: build_model(*parts, build_processor(*parts), adapter=str(hf)),
    }
    for key, door in doors.items():
        with pytest.raises(UserError, match=f"{key}: .* adapter_config.json.*merge"):
            door()
