"""Exported directories: whole or not there, equal to what is in memory, and what others can load."""

import json
import shutil

import pytest
import tiny_models
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

from llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.configuration_llava_bidir import LlavaBidirConfig
from llava_bidir.model.export import as_llava, export_hf

pytestmark = pytest.mark.numerics


def inputs(model) -> dict:
    ids = torch.tensor([[3, *[model.config.image_token_id] * tiny_models.TOKENS, 4, 5]])
    return {"input_ids": ids, "pixel_values": tiny_models.pixels(1)}


@pytest.fixture
def causal(parts):
    processor = build_processor(*parts)
    return build_model(*parts, processor).eval(), processor


def test_as_llava_is_stock_llava_with_equal_logits(causal, tmp_path):
    model, processor = causal
    export_hf(as_llava(model), processor, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == "llava"
    assert not set(LlavaBidirConfig.__annotations__) & set(config)
    assert "auto_map" not in config
    assert not list((tmp_path / "hf").glob("*.py")), "nothing that asks for trust_remote_code"
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")) is type(stock)
    assert torch.equal(stock(**inputs(model)).logits, model(**inputs(model)).logits)
    assert AutoProcessor.from_pretrained(tmp_path / "hf").image_processor.do_pad


def test_sampling_settings_of_the_llm_do_not_stop_the_export_nor_stay_in_it(parts, tmp_path):
    """Vicuna sets a temperature without do_sample. transformers refuses to save that, so training ended in an error.

    Qwen's repetition_penalty would change greedy answers. The token that ends answers in training also ends generation.
    """
    encoder = parts[0]
    llm = tmp_path / "vicuna"
    shutil.copytree(parts[1], llm)
    settings = {
        "eos_token_id": 7,
        "pad_token_id": 0,
        "temperature": 0.9,
        "repetition_penalty": 1.05,
    }
    (llm / "generation_config.json").write_text(json.dumps(settings))
    processor = build_processor(encoder, str(llm))
    model = build_model(encoder, str(llm), processor)
    for exported in (model, as_llava(model)):
        export_hf(exported, processor, tmp_path / "hf")
        saved = GenerationConfig.from_pretrained(tmp_path / "hf")
        assert saved.eos_token_id == sorted([7, processor.tokenizer.eos_token_id])
        assert saved.pad_token_id == processor.tokenizer.pad_token_id
        assert saved.temperature is saved.repetition_penalty is None
        assert not saved.do_sample


def test_as_llava_is_refused_where_the_mask_would_be_lost(parts):
    model = build_model(*parts, build_processor(*parts), image_attention="prefix")
    with pytest.raises(ValueError, match="image_attention is 'prefix', but stock LLaVA is causal"):
        as_llava(model)


def test_a_directory_that_reads_back_otherwise_is_not_left_behind(causal, tmp_path, monkeypatch):
    model, processor = causal
    export_hf(model, processor, tmp_path / "hf")
    before = (tmp_path / "hf/model.safetensors").read_bytes()

    def corrupted(path, **kwargs):
        read = load(path, **kwargs)
        with torch.no_grad():
            read.lm_head.weight[0, 0] += 1
        return read

    load = LlavaBidirForConditionalGeneration.from_pretrained
    monkeypatch.setattr(LlavaBidirForConditionalGeneration, "from_pretrained", corrupted)
    with pytest.raises(RuntimeError, match="lm_head.weight differs after reading it back"):
        export_hf(model, processor, tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == before, (
        "the earlier export is still there"
    )


def test_weights_that_are_not_finite_are_not_exported(causal, tmp_path):
    """The loss of the last step is of the weights before it, so that no check of losses sees them."""
    model, processor = causal
    with torch.no_grad():
        model.lm_head.weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match="lm_head.weight is not finite: the training diverged"):
        export_hf(model, processor, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
