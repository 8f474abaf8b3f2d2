"""Checkpoints of LLaVA's own code become the model that they are."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaForCausalLM

from llava_bidir.cli import main
from llava_bidir.model.build import build_model, build_processor

NAMES = {"linear_1": "0", "linear_2": "2"}


@pytest.fixture(params=["pytorch_model.bin", "model.safetensors"])
def original(request, parts, tmp_path):
    """(directory as LLaVA's code writes it, the same model put together by us)."""
    encoder, llm = parts
    torch.manual_seed(7)
    ours = build_model(encoder, llm, build_processor(encoder, llm)).eval()
    folder = tmp_path / "llava"
    folder.mkdir()
    AutoTokenizer.from_pretrained(llm).save_pretrained(folder)
    weights = LlamaForCausalLM.from_pretrained(llm).state_dict()
    for name, tensor in ours.model.multi_modal_projector.state_dict().items():
        layer, kind = name.split(".")
        weights[f"model.mm_projector.{NAMES[layer]}.{kind}"] = tensor
    if request.param.endswith(".bin"):
        torch.save(weights, folder / request.param)
    else:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / request.param, {"format": "pt"})
    config = json.loads((Path(llm) / "config.json").read_text()) | {
        **{"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"], "torch_dtype": "float32"},
        **{"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "mm_vision_select_layer": -1},
        **{"mm_vision_tower": encoder.path, "image_aspect_ratio": "pad", "mm_hidden_size": 16},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, ours


def test_original_checkpoint_is_exported_with_equal_logits(original, tmp_path):
    folder, ours = original
    main(["export", str(folder), str(tmp_path / "hf"), "--as-llava"])
    read = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
    ids = torch.tensor([[3, *[ours.config.image_token_id] * tiny_models.TOKENS, 4, 5]])
    inputs = {"input_ids": ids, "pixel_values": tiny_models.pixels(1)}
    known = ours.config.image_token_id  # rows beyond the LLM's own words are drawn anew
    assert torch.equal(read(**inputs).logits[..., :known], ours(**inputs).logits[..., :known])


@pytest.mark.parametrize("original", ["model.safetensors"], indirect=True)
def test_what_is_no_llava_15_is_refused(original, tmp_path):
    folder, _ = original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    with pytest.raises(SystemExit, match="mm_projector_type is 'linear'; LLaVA-1.5 has 'mlp2x_gelu'"):
        main(["export", str(folder), str(tmp_path / "hf")])
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "mm_projector.2" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SystemExit, match="has 2 of the adapter's 4 tensors"):
        main(["export", str(folder), str(tmp_path / "hf")])
    assert not (tmp_path / "hf").exists()
