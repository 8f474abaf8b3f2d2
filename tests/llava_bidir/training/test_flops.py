"""The operations of a step against those that torch counts while it runs, and what becomes of them in the log."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from llava_bidir.data.collate import Collate
from llava_bidir.model.build import build_model, build_processor, set_trainable
from llava_bidir.model.lora import Lora, add_lora
from llava_bidir.training import throughput
from llava_bidir.training.flops import count_flops
from llava_bidir.training.supervised_loss import supervised_loss
from llava_bidir.training.throughput import Throughput


def make_batch(processor) -> dict:
    """Two samples of one length, with an image each."""
    turns = tiny_models.turns("<image>\nname", "wall")
    image = Image.new("RGB", (8, 8))
    samples = [{"id": name, "image": image, "conversations": turns} for name in "ab"]
    return Collate(processor, tiny_models.TOKENS, "vicuna_v1")(samples)


@pytest.fixture
def training(parts):
    """A model whose adapter trains, and a batch."""
    processor = build_processor(*parts)
    model = build_model(*parts, processor, attn_implementation="eager")
    set_trainable(model, ["adapter"])
    return model, make_batch(processor)


@pytest.mark.parametrize(
    ("trainable", "rank"),
    [(["adapter"], None), (["adapter", "llm"], None), (["adapter", "llm"], 2)],
)
def test_counted_operations_are_those_that_torch_counts(training, trainable, rank):
    model, batch = training
    if rank:
        add_lora(model, Lora(r=rank))
    set_trainable(model, trainable)
    flops = count_flops(model, batch["pixel_values"][:1])
    with FlopCounterMode(display=False) as counter:
        supervised_loss(model, batch).backward()
    found = flops.of_batch(2, batch["lengths"], batch["supervised"])
    assert found == counter.get_total_flops()


class Clock:
    """A trainer whose step takes two seconds."""

    global_step = 0
    world_size = 2
    log_every_n_steps = 1
    precision = "32-true"
    precision_plugin = SimpleNamespace(forward_context=nullcontext)


def logged_rates(model, batch, monkeypatch, **settings) -> dict[str, float]:
    """What is logged after a step of two micro-batches."""
    now = 0.0
    logged = {}
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    module = SimpleNamespace(
        device=torch.device("cpu"),
        log_dict=logged.update,
        model=model,
        count_flops=lambda: count_flops(model, batch["pixel_values"][:1]),
    )
    trainer = Clock()
    callback = Throughput(**settings)
    callback.on_train_start(trainer, module)
    now += 2
    for trainer.global_step in (0, 1):
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    return logged


def test_utilisation_is_the_share_of_what_a_device_can_do(training, monkeypatch):
    model, batch = training
    logged = logged_rates(model, batch, monkeypatch, peak_tflops=3.0)
    needed = count_flops(model, batch["pixel_values"][:1]).of_batch(
        len(batch["pixel_values"]), batch["lengths"], batch["supervised"]
    )
    assert logged["train/mfu"] == 2 * needed / 2 / 3e12
