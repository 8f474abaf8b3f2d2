"""Configs whose parts transformers would make of its defaults are refused, wherever a checkpoint is read."""

import json
import shutil

import pytest
import tiny_families
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlavaProcessor

from llava_bidir.cli import main as llava_bidir_main
from llava_bidir.common.errors import UserError
from llava_bidir.common.hf_loading import read_pretrained
from probes.cli import main as probes_main

AUTHORS = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "mm_hidden_size": 1024,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "vocab_size": 32000,
}
OF_THE_AUTHORS = "is in the format of LLaVA's authors .model_type '{}'.*those of llava-hf"


def write(folder, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("kind", ["llava", "llava_llama", "llava_mistral"])
def test_the_authors_format_is_named(kind, tmp_path):
    """`probes sites` described 40 layers of width 5120 as 32 of 4096."""
    path = write(tmp_path, AUTHORS | {"model_type": kind})
    with pytest.raises(SystemExit, match=OF_THE_AUTHORS.format(kind)):
        probes_main(["sites", path])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit, match=OF_THE_AUTHORS.format(kind)):
        llava_bidir_main(["generate", path, str(tmp_path / "a.png"), "what"])


def config_of(name: str, folder) -> dict:
    """Write the config of a tiny model, as transformers writes it."""
    settings = dict(tiny_families.STOCK[name].config)
    AutoConfig.for_model(settings.pop("model_type"), **settings).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", sorted(tiny_families.STOCK))
def test_a_config_without_a_part_is_refused_for_every_family(name, tmp_path):
    whole = config_of(name, tmp_path)
    assert read_pretrained("MLLM", AutoConfig, str(tmp_path)).model_type == whole["model_type"]
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
    found = read_pretrained("MLLM", AutoConfig, write(tmp_path, flat | whole)).get_text_config()
    assert found.num_hidden_layers == text["num_hidden_layers"]


def test_an_unknown_kind_is_named_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="knows no model_type 'foo'; a later version may$"):
        read_pretrained("MLLM", AutoConfig, write(tmp_path, {"model_type": "foo"}))


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
