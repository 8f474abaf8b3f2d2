"""Training speed: samples/s, tokens/s, seconds a step, MFU and memory."""

import time
from collections import Counter
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype

from llava_bidir.common.cli import Positive
from llava_bidir.data.collate import Batch

from .flops import ModelFlops

# Timing-dependent metrics: logged, but not exported, so that exports are reproducible.
TIMING_METRICS = "samples_per_s tokens_per_s step_s memory_gb mfu".split()


class Throughput(Callback):
    """Log the training speed, averaged between two logged steps, or since a validation between them.

    Over all devices: samples/s, tokens/s (without padding). For this device: seconds per step, peak memory, and MFU
    (flops.py). What a step waits for, Lightning's `--trainer.profiler simple` tells.

    Lightning's ThroughputMonitor synchronises with the GPU after each batch; this callback reads the clock when a step
    is logged. Rates over all devices assume that all are as fast as this one.

    Args:
        peak_tflops: 10^12 operations per second that a device can do at most, for MFU. None: what Lightning knows of
            the GPU; of one that it does not know, and of a CPU, no MFU is logged.
    """

    def __init__(self, peak_tflops: Positive | None = None):
        self.peak = peak_tflops and 1e12 * peak_tflops
        self.flops: ModelFlops | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        if self.peak is None and pl_module.device.type == "cuda":
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self.peak = get_available_flops(pl_module.device, dtype)
        self._start_window(trainer)

    def _start_window(self, trainer: Trainer) -> None:
        self.counts = Counter()
        self.first_step = trainer.global_step
        self.since = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, *args: Any
    ) -> None:
        """Count the operations of the model before its first batch, if there is a peak to compare them with."""
        if self.peak is not None and self.flops is None:
            with trainer.precision_plugin.forward_context():
                self.flops = pl_module.count_flops(batch["pixel_values"][:1])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *args: Any
    ) -> None:
        """Count the batch, and log the rates at a logged step (`trainer.log_every_n_steps`, of which 0 is never)."""
        lengths = batch["lengths"]
        self.counts.update(samples=len(lengths), tokens=sum(lengths))
        if self.flops is not None:
            images = len(batch["pixel_values"])
            self.counts["flops"] += self.flops.of_batch(images, lengths, batch["supervised"])
        steps = trainer.global_step - self.first_step
        every = trainer.log_every_n_steps
        if steps > 0 and every > 0 and trainer.global_step % every == 0:
            pl_module.log_dict(self._rates(steps, trainer.world_size))
            if pl_module.device.type == "cuda":
                memory = torch.cuda.max_memory_allocated(pl_module.device)
                pl_module.log("train/memory_gb", memory / 1e9)
            self._start_window(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock: validation is neither training nor waiting for data."""
        self._start_window(trainer)

    def _rates(self, steps: int, devices: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self.since
        counts = self.counts
        rates = {
            "samples_per_s": devices * counts["samples"] / elapsed,
            "tokens_per_s": devices * counts["tokens"] / elapsed,
            "step_s": elapsed / steps,
        }
        if self.flops is not None:
            rates["mfu"] = counts["flops"] / elapsed / self.peak
        return {f"train/{name}": float(value) for name, value in rates.items()}
