"""Training speed: samples/s, tokens/s, and MFU from the FLOPs of the model's own layers.

A multiply-add is two FLOPs. Recomputation (gradient checkpointing) and padding are not counted.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from llava_bidir.common.step_boundary import is_logged
from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

# Timing-dependent metrics: logged, but not exported, so that exports are reproducible.
TIMING_METRICS = "samples_per_s tokens_per_s tflops_per_s_and_device step_s data_share mfu memory_gb".split()

# Dense bfloat16; the first match wins. Source: NVIDIA's data sheets. Lightning's value for the H200 is with sparsity.
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756, "H100": 989.4, "A100": 312, "L40S": 362, "RTX 4090": 165.2}


def step_flops(model: LlavaBidirForConditionalGeneration) -> Callable[[Sequence[int], int, int], float]:
    """Return a function that counts the FLOPs of a step, forward and backward.

    Its arguments are the lengths of the samples in tokens, the number of supervised tokens and the number of images.
    The backward pass of a linear layer costs as much as its forward for the input, and again for a trainable weight.
    Attention has two inputs, and counts all N * N pairs of tokens, because kernels also compute the masked half. There
    is no backward pass before the adapter.

    Args:
        model: Model with `requires_grad` set as in training; may be on the meta device.
    """
    llm, text, adapter = model.model.language_model, model.config.text_config, model.model.multi_modal_projector
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    trains = adapter.linear_1.weight.requires_grad
    adapter_flops = _linear(adapter.linear_1, input_gradient=False) + _linear(adapter.linear_2, input_gradient=trains)
    per_token, per_prediction = _linear(llm), _linear(model.lm_head)
    per_pair = 3 * text.num_hidden_layers * 4 * width
    per_image = encoder_flops(model) + model.config.image_seq_length * adapter_flops

    def count(lengths: Sequence[int], predictions: int, images: int) -> float:
        pairs = sum(length * length for length in lengths)
        return sum(lengths) * per_token + pairs * per_pair + predictions * per_prediction + images * per_image

    return count


def encoder_flops(model: LlavaBidirForConditionalGeneration) -> float:
    """Return the encoder's forward FLOPs per image, for all layers (transformers also runs the last one)."""
    vision, tower = model.config.vision_config, model.model.vision_tower
    extra = model.config.register_tokens + (model.config.vision_feature_select_strategy == "default")
    patches = model.config.image_seq_length
    tokens = patches + extra
    per_patch = 2 * vision.num_channels * vision.patch_size**2 * vision.hidden_size
    attention = vision.num_hidden_layers * 4 * tokens**2 * vision.hidden_size
    return patches * per_patch + tokens * _linear(tower, input_gradient=False) + attention


def _linear(module: nn.Module, input_gradient: bool = True) -> float:
    """Return forward and backward FLOPs per token of all linear layers in `module`."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(2.0 * m.in_features * m.out_features * (1 + input_gradient + m.weight.requires_grad) for m in layers)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a device in dense bfloat16, in FLOP/s, or None if it is unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part.lower() in name.lower()), None)


class Throughput(Callback):
    """Log the training speed, averaged between two logged steps, or since a validation between them.

    Over all devices: samples/s, tokens/s (without padding), MFU. For this device: seconds per step, share of time spent
    waiting for data, shares of padding and text-only samples, peak memory.

    Lightning's ThroughputMonitor synchronises with the GPU after each batch; this callback reads the clock when a step
    is logged. Rates over all devices assume that all are as fast as this one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the model's FLOPs and start the clock."""
        self.step_flops = step_flops(pl_module.model)
        self.peak = peak_flops(pl_module.device)
        self.batch_ended = time.perf_counter()
        self._start_window(trainer)

    def _start_window(self, trainer: Trainer) -> None:
        self.counts = Counter()
        self.first_step, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        """Add the time since the last batch to the time spent waiting for data."""
        self.counts["waited"] += time.perf_counter() - self.batch_ended

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        """Count the batch, and log the rates at a logged step."""
        self._count(batch)
        steps = trainer.global_step - self.first_step
        if steps > 0 and is_logged(trainer):
            pl_module.log_dict(self._rates(steps, trainer.world_size))
            if pl_module.device.type == "cuda":
                pl_module.log("train/memory_gb", torch.cuda.max_memory_allocated(pl_module.device) / 1e9)
            self._start_window(trainer)
        self.batch_ended = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock: validation is neither training nor waiting for data."""
        self._start_window(trainer)
        self.batch_ended = time.perf_counter()

    def _count(self, batch: dict) -> None:
        lengths, images = batch["lengths"], 0 if batch["pixel_values"] is None else len(batch["pixel_values"])
        self.counts.update(
            samples=len(lengths),
            text_only=batch["text_only"],
            tokens=sum(lengths),
            padded=batch["input_ids"].numel(),
            flops=self.step_flops(lengths, batch["supervised"], images),
        )

    def _rates(self, steps: int, devices: int) -> dict[str, float]:
        elapsed, counts = time.perf_counter() - self.since, self.counts
        rates = {
            "samples_per_s": devices * counts["samples"] / elapsed,
            "tokens_per_s": devices * counts["tokens"] / elapsed,
            "tflops_per_s_and_device": counts["flops"] / elapsed / 1e12,
            "step_s": elapsed / steps,
            "data_share": counts["waited"] / elapsed,
            "padding_share": 1 - counts["tokens"] / counts["padded"],
            "text_only_share": counts["text_only"] / counts["samples"],
        }
        if self.peak is not None:
            rates["mfu"] = counts["flops"] / elapsed / self.peak
        return {f"train/{name}": float(value) for name, value in rates.items()}
