"""Low-rank updates: merged and unmerged models are equal."""

import pytest
import tiny_models
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from llava_bidir.command_options import ExportOptions
from llava_bidir.commands import export
from llava_bidir.model.build import build_processor
from llava_bidir.model.lora import Lora, add_lora, has_lora, merge_lora

pytestmark = pytest.mark.numerics


@pytest.fixture
def updated():
    """Return a tiny model with updates as large as its weights."""
    model = tiny_models.model("bidirectional")
    torch.manual_seed(5)
    add_lora(model, Lora(r=3, alpha=6, dropout=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids, mask = tiny_models.ids("ttiiiitt", "tiiiitt")
    return model(input_ids=ids, attention_mask=mask, pixel_values=tiny_models.pixels(2)).logits


def test_merging_does_not_change_the_model(updated):
    before = {name: tensor.clone() for name, tensor in updated.state_dict().items()}
    expected = logits(updated)
    merged = merge_lora(updated)
    assert not has_lora(merged)
    assert has_lora(updated)
    assert torch.equal(logits(updated), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in updated.state_dict().items())
    assert merged.lm_head.weight is updated.lm_head.weight, "tensors that are not merged are shared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_equal_the_sum_in_float32_rounded_once(updated, dtype):
    """peft alone rounds updates of 16 bits before it adds them."""
    updated.to(dtype)
    merged = merge_lora(updated)
    layers = [
        (name, layer) for name, layer in updated.named_modules() if isinstance(layer, LoraLayer)
    ]
    assert len(layers) == 21
    for name, layer in layers:
        a = layer.lora_A["default"].weight
        b = layer.lora_B["default"].weight
        update = 2 * (b.float() @ a.float())  # alpha / r
        expected = (layer.get_base_layer().weight.float() + update).to(dtype)
        assert torch.equal(merged.get_submodule(name).weight, expected)


def test_export_in_float32_keeps_what_16_bits_would_round(updated, parts, tmp_path, monkeypatch):
    updated.to(torch.bfloat16)
    read = (updated, build_processor(*parts), {})
    monkeypatch.setattr(export, "read_checkpoint", lambda path: read)
    options = ExportOptions(source=tmp_path, out=tmp_path / "hf", dtype="float32")
    export.run(options)
    written = load_file(tmp_path / "hf/model.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj"
    layer = updated.get_submodule(name)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = layer.get_base_layer().weight + 2 * update  # alpha / r
    assert expected.dtype == torch.float32
    (exported,) = (
        tensor
        for key, tensor in written.items()
        if key.endswith("layers.0.self_attn.q_proj.weight") and "language" in key
    )
    torch.testing.assert_close(exported, expected)
