"""Loss against samples alone; no wait for the device."""

from functools import partialmethod

import pytest
import reference
import tiny_models
import torch
import torch.nn.functional as F
from device_reads import DeviceReads
from PIL import Image

from llava_bidir import IMAGE_ATTENTION
from llava_bidir.data.collate import Collate
from llava_bidir.training.module import LlavaTraining

pytestmark = pytest.mark.numerics

MASKS = tuple(IMAGE_ATTENTION)
ANSWERS = ("wall " * 20, "sky", "road wall", "sky " * 6, "wall", "road")


def samples(shown: bool = True) -> list[dict]:
    made = []
    for i, answer in enumerate(ANSWERS):
        image = Image.new("RGB", (8, 8), (40 * i, 255 - 30 * i, 90)) if shown and i != 2 else None
        question = "name the sky" if image is None else "<image>\nname the sky"
        made.append(
            {"id": f"s{i}", "image": image, "conversations": tiny_models.turns(question, answer)}
        )
    # Shown twice
    made[1]["conversations"] += tiny_models.turns("<image>\nagain" if shown else "again", "road")
    return made


def build(parts, name: str, **settings) -> tuple[LlavaTraining, Collate]:
    torch.manual_seed(0)
    module = LlavaTraining(*parts, trainable=["adapter", "llm"], image_attention=name, **settings)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # attention far from uniform, so that a leak shows
    return module, Collate(module.processor, tiny_models.TOKENS, "vicuna_v1")


def assert_same_training(module, expected, batch) -> None:
    """Compare the loss and the gradients of two modules."""
    losses = []
    for each in (module, expected):
        losses.append(each.loss(batch))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    pairs = zip(module.model.named_parameters(), expected.model.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        if theirs.requires_grad:
            near = 1e-5 * theirs.grad.abs().max().item()
            difference = (ours.grad - theirs.grad).abs().max()
            assert difference <= near, name


@torch.no_grad()
def llava_logits(
    model, image_attention: str, ids: torch.Tensor, pixels: torch.Tensor
) -> torch.Tensor:
    """Return the logits f[N, V] of a sample without padding, ids i64[N], by attention that is written out.

    The model, whose LLM is a Llama, is used for its weights, and for the features of images.
    """
    is_image = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids)
    if is_image.any():
        embedded[is_image] = torch.cat(list(model.get_image_features(pixels).pooler_output))
    decoder = model.model.language_model
    mask = reference.mask_by_loop(image_attention, is_image[None], torch.ones_like(ids)[None])
    masks = [mask] * len(decoder.layers)
    states = reference.llama_states(
        decoder, inputs=embedded[None], masks=masks, positions=torch.arange(len(ids))
    )
    return model.lm_head(decoder.norm(states[-1]))[0]


@pytest.mark.parametrize("name", MASKS)
def test_loss_is_that_of_each_sample_alone(name, parts):
    """By attention that is written out, without rows, padding, masks of ours and `predicts`."""
    module, collate = build(parts, name)
    total = 0.0
    count = 0
    for item in samples():
        ids, labels = (torch.tensor(row) for row in collate.encode(item))
        pixels = collate.pixels([item], [ids.tolist()])
        logits = llava_logits(module.model, image_attention=name, ids=ids, pixels=pixels)[:-1]
        loss = F.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
        total += loss.item()
        count += int((labels[1:] != -100).sum())
    assert module.loss(collate(samples())).item() == pytest.approx(total / count, rel=1e-5)


def test_recomputed_layers_run_twice_and_leave_loss_and_gradients(parts):
    plain, collate = build(parts, "bidirectional")
    recomputed, _ = build(parts, "bidirectional", gradient_checkpointing=True)
    runs = []
    for layer in recomputed.model.model.language_model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *args: runs.append(args))
    assert_same_training(recomputed.train(), plain.train(), collate(samples()))
    assert len(runs) == 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)]
)
def test_compiled_layers_leave_loss_and_gradients(backend, parts, monkeypatch):
    """Inductor, which is what training uses, takes a minute of C++."""
    monkeypatch.setattr(
        "torch.nn.Module.compile", partialmethod(torch.nn.Module.compile, backend=backend)
    )
    torch.compiler.reset()
    plain, collate = build(parts, "bidirectional")
    compiled, _ = build(parts, "bidirectional", compile=True, gradient_checkpointing=True)
    assert_same_training(compiled.train(), plain.train(), collate(samples()))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0, "nothing was compiled"
    compiled.on_validation_start()
    compiled.loss(collate(samples()[:1]))
    compiled.on_validation_end()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("name", MASKS)
def test_no_forward_or_backward_pass_waits_for_the_device(name, parts):
    module, collate = build(parts, name, gradient_checkpointing=True)
    for shown in (True, False):
        batch = collate(samples(shown))
        with DeviceReads() as mode:
            module.train().loss(batch).backward()
        # transformers looks for packed samples in the positions of a causal row without a mask
        expected = ["_local_scalar_dense"] if name == "causal" or not shown else []
        assert mode.reads == expected
