"""FLOPs against torch's counter, which observes every matrix product."""

from collections import Counter
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from llava_bidir.data.collate import Collate
from llava_bidir.model.build import build_model, build_processor, set_trainable
from llava_bidir.training import throughput
from llava_bidir.training.throughput import Throughput, peak_flops, step_flops


@pytest.mark.parametrize("train", [["adapter"], ["adapter", "llm"]])
@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
def test_step_flops_equal_what_torch_counts(train, image_attention, parts):
    model = build_model(*parts, build_processor(*parts), image_attention=image_attention, attn_implementation="eager")
    model.model.vision_tower.set_attn_implementation("eager")  # the counter does not support sdpa on CPUs
    set_trainable(model, train)
    image = [model.config.image_token_id] * tiny_models.TOKENS
    ids = torch.tensor([[3, *image, 4, 5, 6], [3, 4, *image, 5, 6]])
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, pixel_values=tiny_models.pixels(2), use_cache=False).logits
        logits.sum().backward()
    assert counter.get_total_flops() == step_flops(model)([8, 8], predictions=16, images=2)


def test_peak_is_unknown_on_a_cpu():
    assert peak_flops(torch.device("cpu")) is None


def test_sample_that_shows_its_image_twice_counts_once_as_one_with_an_image(parts):
    turns = tiny_models.turns("<image>\nname", "wall", "<image>\nand", "sky")
    image = Image.new("RGB", (8, 8))
    samples = [{"id": "a", "image": image, "conversations": turns}, {"id": "b", "image": None, "conversations": turns}]
    callback = Throughput()
    callback.counts, callback.step_flops = Counter(), lambda *args: 0.0
    callback._count(Collate(build_processor(*parts), tiny_models.TOKENS, "vicuna_v1")(samples))
    assert callback.counts["text_only"] == 1


def test_validation_is_neither_training_nor_waiting_for_data(monkeypatch):
    now, logged = 0.0, {}
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=1)
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=logged.update)
    batch = {"lengths": [3, 5], "pixel_values": None, "text_only": 2, "input_ids": torch.zeros(2, 5), "supervised": 4}
    callback = Throughput()
    callback.step_flops, callback.peak, callback.batch_ended = lambda *args: 0.0, None, now
    callback._start_window(trainer)
    for _ in range(2):
        now += 1  # waits for data
        callback.on_train_batch_start(trainer, module, batch, 0)
        now += 3
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, batch, 0)
        now += 100
        callback.on_validation_end(trainer, module)
    assert (logged["train/step_s"], logged["train/data_share"], logged["train/samples_per_s"]) == (4, 0.25, 0.5)
