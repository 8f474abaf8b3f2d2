"""Loss of packed rows against one sample per row and against samples alone; no wait for the device."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from device_reads import DeviceReads
from PIL import Image
from transformers import LlamaConfig, MistralConfig, Qwen3_5TextConfig

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.cli import main
from llava_bidir.common.errors import UserError
from llava_bidir.data.collate import Collate
from llava_bidir.model import modeling_llava_bidir
from llava_bidir.training.module import LlavaTraining
from llava_bidir.training.supervised_loss import check_packing, supervised_loss

pytestmark = pytest.mark.numerics

MASKS = tuple(IMAGE_ATTENTION)
ANSWERS = ("wall " * 20, "sky", "road wall", "sky " * 6, "wall", "road")
ROW = 60  # tokens


def samples(shown: bool = True) -> list[dict]:
    made = []
    for i, answer in enumerate(ANSWERS):
        image = Image.new("RGB", (8, 8), (40 * i, 255 - 30 * i, 90)) if shown and i != 2 else None
        question = "name the sky" if image is None else "<image>\nname the sky"
        made.append({"id": f"s{i}", "image": image, "conversations": tiny_models.turns(question, answer)})
    made[1]["conversations"] += tiny_models.turns("<image>\nagain" if shown else "again", "road")  # shown twice
    return made


def build(parts, name: str, **settings) -> tuple[LlavaTraining, Collate]:
    torch.manual_seed(0)
    module = LlavaTraining(*parts, trainable=["adapter", "llm"], image_attention=name, **settings)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # attention far from uniform, so that a leak shows
    return module, Collate(module.processor, tiny_models.TOKENS, "vicuna_v1", pack_tokens=ROW)


def loss_and_gradients(module, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module.model.zero_grad()
    loss = module.loss(batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in module.model.named_parameters() if p.requires_grad}


def assert_equal(ours, expected) -> None:
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=0)
    for name, gradient in expected[1].items():
        near = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_packed_loss_and_gradients_equal_unpacked_ones(backend, name, shown, parts):
    module, collate = build(parts, name, attn_implementation=backend)
    packed, unpacked = collate(samples(shown)), replace(collate, pack_tokens=None)(samples(shown))
    assert len(packed["input_ids"]) < len(unpacked["input_ids"]) == len(ANSWERS)
    assert any(len(row) > 2 for row in packed["samples"])
    assert len(packed["pixel_values"]) == 6 if shown else packed["pixel_values"] is None
    assert_equal(loss_and_gradients(module, packed), loss_and_gradients(module, unpacked))


@pytest.mark.parametrize("name", MASKS)
def test_loss_is_that_of_each_sample_alone(name, parts):
    """Without rows, padding, masks of ours and `predicts`."""
    module, collate = build(parts, name)
    total, count = 0.0, 0
    for item in samples():
        ids, labels = (torch.tensor([row]) for row in collate.encode(item))
        pixels = collate.pixels([item], ids.tolist())
        logits = module.model(input_ids=ids, pixel_values=pixels).logits[0, :-1]
        total += F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum").item()
        count += (labels[0, 1:] != -100).sum().item()
    for pack_tokens in (ROW, None):
        loss = module.loss(replace(collate, pack_tokens=pack_tokens)(samples())).item()
        assert loss == pytest.approx(total / count, rel=1e-5)


def test_a_training_that_is_right_is_not_warned_of_images_that_are_read_as_text(
    parts, conversations, tmp_path, monkeypatch
):
    """Losses, answers in validation, and the check of the export, on samples with images and without."""
    warnings = []
    monkeypatch.setattr(modeling_llava_bidir.logger, "warning_once", warnings.append)
    command = ["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(tmp_path)]
    main([*command, "--model.image_attention", "bidirectional", "--trainer.max_epochs", "1"])
    assert (tmp_path / "hf/model.safetensors").is_file() and not warnings


def test_recomputed_layers_run_twice_and_leave_loss_and_gradients(parts):
    results, runs = [], []
    for recompute in (False, True):
        module, collate = build(parts, "bidirectional", gradient_checkpointing=recompute)
        for layer in module.model.model.language_model.layers:
            layer.self_attn.register_forward_pre_hook(lambda *args, r=recompute: runs.append(r))
        module.model.train()
        results.append(loss_and_gradients(module, collate(samples())))
    assert_equal(results[1], results[0])
    assert runs == [False] * 3 + [True] * 6


def row_logits(model, batch) -> torch.Tensor:
    """Return the logits of all tokens, f[B, N, V], computed as in a training step."""
    head, states = model.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    with torch.no_grad():
        supervised_loss(model, batch)
        hook.remove()
        return head(states[0])


def changed(parts, name: str) -> torch.Tensor:
    """Return bool[N], where the logits of a row change when the first sample's image and text do."""
    module, collate = build(parts, name)
    pair = [samples()[3], samples()[4]]
    batch = replace(collate, pack_tokens=300)([*pair, samples()[5]])
    assert batch["samples"] == [batch["lengths"]], "one row of three samples with an image each"
    other = batch | {"input_ids": batch["input_ids"].clone(), "pixel_values": batch["pixel_values"].clone()}
    other["pixel_values"][1] += 1.0  # of the second sample
    begin, end = batch["lengths"][0], sum(batch["lengths"][:2])
    text = slice(end - 3, end)
    other["input_ids"][0, text] = batch["input_ids"][0, text] + 1
    difference = (row_logits(module.model, batch) - row_logits(module.model, other)).abs().amax(-1)[0]
    return difference > 1e-6, slice(begin, end)


@pytest.mark.parametrize("name", MASKS)
def test_a_sample_changes_no_logit_of_its_neighbours(name, parts):
    differs, own = changed(parts, name)
    assert differs[own][4:].all() and not differs[own][:3].any() or name == "prefix", "it changes its own"
    differs[own] = False
    assert not differs.any()


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def config_holder(llm, backend: str) -> SimpleNamespace:
    """A model as far as `check_packing` reads it: flash attention cannot be built on a CPU."""
    config = tiny_models.config(text_config=llm)
    config.get_text_config()._attn_implementation = backend
    return SimpleNamespace(config=config)


def test_layers_and_backends_that_would_mix_samples_are_refused():
    linear = Qwen3_5TextConfig(**SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(UserError, match="data.pack_tokens: linear_attention layers of .* would mix the samples"):
        check_packing(config_holder(linear, "sdpa"))
    with pytest.raises(UserError, match="model.attn_implementation flash_attention_2 would mix the samples"):
        check_packing(config_holder(LlamaConfig(**SIZES), "flash_attention_2"))
    check_packing(config_holder(MistralConfig(**SIZES, sliding_window=6), "eager"))


def device_reads(module, batch) -> list[str]:
    with DeviceReads() as mode:
        module.loss(batch).backward()
    return mode.reads


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("pack_tokens", [ROW, None])
def test_no_forward_or_backward_pass_waits_for_the_device(pack_tokens, name, parts):
    module, collate = build(parts, name, gradient_checkpointing=True)
    for shown in (True, False):
        reads = device_reads(module.train(), replace(collate, pack_tokens=pack_tokens)(samples(shown)))
        # transformers looks for packed samples in the positions of a causal row without a mask
        expected = ["_local_scalar_dense"] if pack_tokens is None and (name == "causal" or not shown) else []
        assert reads == expected


@pytest.mark.parametrize("change", [1, -1])
def test_other_number_of_features_than_image_tokens_is_an_error(change, parts):
    """Without a count on the device. Features would otherwise belong to other images."""
    module, collate = build(parts, "causal")
    batch = collate(samples())
    positions = batch["image_positions"]
    batch["image_positions"] = torch.cat([positions, positions[:1]]) if change > 0 else positions[:-1]
    with pytest.raises((RuntimeError, IndexError), match="index_copy"):
        module.loss(batch)
