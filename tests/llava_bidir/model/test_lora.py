"""Low-rank updates: merged and unmerged models are equal."""

import re

import pytest
import tiny_models
import torch
from peft.tuners.lora import LoraLayer

from llava_bidir.model.lora import Lora, add_lora, has_lora, merge_lora

pytestmark = pytest.mark.numerics


@pytest.fixture
def updated():
    """Return a tiny model with updates as large as its weights."""
    model = tiny_models.model("bidirectional")
    torch.manual_seed(5)
    add_lora(
        model,
        Lora(
            r=3,
            alpha=6,
            dropout=0.1,
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids, mask = tiny_models.ids("ttiiiitt", "tiiiitt")
    return model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=tiny_models.pixels(2),
    ).logits


def test_merging_does_not_change_the_model(updated, tmp_path):
    before = {name: tensor.clone() for name, tensor in updated.state_dict().items()}
    expected = logits(updated)
    merged = merge_lora(updated, tmp_path)
    assert has_lora(updated)
    assert torch.equal(logits(updated), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in updated.state_dict().items())
    assert merged.lm_head.weight is updated.lm_head.weight, "tensors that are not merged are shared"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_mapped_files_and_equal_the_sum(updated, dtype, tmp_path):
    """A copy of a 7B model would not fit beside it into the memory of a small machine."""
    updated.to(dtype)
    merged = merge_lora(updated, tmp_path)
    layers = [
        (name, layer) for name, layer in updated.named_modules() if isinstance(layer, LoraLayer)
    ]
    assert len(layers) == 21
    for name, layer in layers:
        a = layer.lora_A["default"].weight
        b = layer.lora_B["default"].weight
        update = 2 * (b.float() @ a.float())  # alpha / r
        expected = (layer.get_base_layer().weight.float() + update).to(dtype)
        found = merged.get_submodule(name).weight
        assert torch.equal(found, expected), "rounded once"
        stored = torch.frombuffer(bytearray((tmp_path / name).read_bytes()), dtype=dtype)
        assert torch.equal(stored.view_as(found), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_share_of_the_updates_that_rounding_takes_is_logged(updated, dtype, caplog, tmp_path):
    """Updates of 1e-3 of the weights, as after few steps, are less than bfloat16 resolves."""
    layers = {
        name: layer for name, layer in updated.named_modules() if isinstance(layer, LoraLayer)
    }
    updates = {}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.get_base_layer().to(dtype)
            layer.lora_B["default"].weight.mul_(1e-3)
            updates[name] = layer.get_delta_weight("default")
    with caplog.at_level("INFO"):
        merged = merge_lora(updated, tmp_path)
    lost = torch.cat(
        [
            (
                merged.get_submodule(name).weight.double()
                - layer.get_base_layer().weight.double()
                - updates[name].double()
            ).flatten()
            for name, layer in layers.items()
        ]
    )
    share = lost.norm() / torch.cat([update.flatten() for update in updates.values()]).norm()
    (message,) = caplog.messages
    name = str(dtype).removeprefix("torch.")
    said = re.search(f"into {name} weights; rounding took (\\S+?) of their norm", message)[1]
    assert float(said) == pytest.approx(float(share), rel=0.1)
    assert ("--dtype float32" in message) == (dtype == torch.bfloat16)
    assert (share > 0.1) == (dtype == torch.bfloat16)
