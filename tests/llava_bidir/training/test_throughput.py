"""What the training speed counts."""

from types import SimpleNamespace

import torch

from llava_bidir.training import throughput
from llava_bidir.training.throughput import Throughput


def test_validation_is_no_training(monkeypatch):
    now = 0.0
    logged = {}
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, world_size=1)
    module = SimpleNamespace(device=torch.device("cpu"), log_dict=logged.update)
    batch = {"lengths": [3, 5], "pixel_values": torch.zeros(1, 3, 2, 2), "supervised": 4}
    callback = Throughput()
    callback.flops = SimpleNamespace(of_batch=lambda *counts: 6e12)
    callback.peak = 3e12
    callback._start_window(trainer)
    for _ in range(2):
        now += 4
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, batch, 0)
        now += 100
        callback.on_validation_end(trainer, module)
    names = ("step_s", "samples_per_s", "mfu")
    assert [logged[f"train/{name}"] for name in names] == [4, 0.5, 0.5]
