"""FLOPs of a training step, counted from the model's own layers, and the peak of a device, for MFU.

A multiply-add is two FLOPs. What is computed twice (gradient checkpointing) counts once, padding not at all.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration

# Dense bfloat16; the first match wins. Source: NVIDIA's data sheets. Lightning's table has the H200 with sparsity.
PEAK_TFLOPS = {"H200": 989.4, "H100 PCIe": 756, "H100": 989.4, "A100": 312, "L40S": 362, "RTX 4090": 165.2}


@dataclass(frozen=True)
class StepFlops:
    """What forward and backward cost.

    Args:
        per_token: The LLM's linear layers, for each token.
        per_pair: Its attention, for each pair of tokens of a sample (all N * N: kernels compute the masked half too).
        per_prediction: The head, for each supervised token.
        per_image: Encoder and adapter.
    """

    per_token: float
    per_pair: float
    per_prediction: float
    per_image: float

    def step(self, lengths: Sequence[int], predictions: int, images: int) -> float:
        """FLOPs for samples of these lengths in tokens, that many supervised tokens and images."""
        pairs = sum(length * length for length in lengths)
        return (
            sum(lengths) * self.per_token
            + pairs * self.per_pair
            + predictions * self.per_prediction
            + images * self.per_image
        )


def step_flops(model: LlavaBidirForConditionalGeneration) -> StepFlops:
    """Counts a model whose parts are frozen or not as they will be in training; one on the meta device will do.

    The backward pass of a linear layer takes its forward's FLOPs once for the input, and once more for the weight if
    that trains; attention has two inputs. Nothing in front of the adapter has a backward pass.
    """
    llm, text, adapter = model.model.language_model, model.config.text_config, model.model.multi_modal_projector
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    trains = adapter.linear_1.weight.requires_grad
    adapter_flops = _linear(adapter.linear_1, input_gradient=False) + _linear(adapter.linear_2, input_gradient=trains)
    return StepFlops(
        per_token=_linear(llm),
        per_pair=3 * text.num_hidden_layers * 4 * width,
        per_prediction=_linear(model.lm_head),
        per_image=encoder_flops(model) + model.config.image_seq_length * adapter_flops,
    )


def encoder_flops(model: LlavaBidirForConditionalGeneration) -> float:
    """Forward FLOPs of the encoder for one image, all of its layers (transformers runs the last one too)."""
    vision, tower = model.config.vision_config, model.model.vision_tower
    extra = model.config.register_tokens + (model.config.vision_feature_select_strategy == "default")
    patches = model.config.image_seq_length
    tokens = patches + extra
    per_patch = 2 * vision.num_channels * vision.patch_size**2 * vision.hidden_size
    attention = vision.num_hidden_layers * 4 * tokens**2 * vision.hidden_size
    return patches * per_patch + tokens * _linear(tower, input_gradient=False) + attention


def _linear(module: nn.Module, input_gradient: bool = True) -> float:
    """FLOPs of all linear layers within, forward and backward, for one token."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(2.0 * m.in_features * m.out_features * (1 + input_gradient + m.weight.requires_grad) for m in layers)


def peak_flops(device: torch.device) -> float | None:
    """The most that a device can do in dense bfloat16, in FLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part.lower() in name.lower()), None)


# What the clock or the machine decides: for TensorBoard only, for the same training exports the same files.
MEASURED = ("samples_per_s", "tokens_per_s", "tflops_per_s_and_device", "step_s", "data_share", "mfu", "memory_gb")


class Throughput(Callback):
    """Logs how fast training is, averaged between two logged steps: samples/s, tokens/s (without padding) and MFU over
    all devices, seconds of a step and the share of them spent waiting for data, shares of padding and of text-only
    samples, and the most memory that this device held.

    Lightning's ThroughputMonitor waits for the GPU after each batch; this one reads the clock when a step is logged.
    Rates over all devices take the others to be like this one.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flops = step_flops(pl_module.model)
        self.peak = peak_flops(pl_module.device)
        self.batch_ended = time.perf_counter()
        self._start_window(trainer)

    def _start_window(self, trainer: Trainer) -> None:
        self.counts = dict.fromkeys(("samples", "text_only", "tokens", "padded", "flops", "waited"), 0.0)
        self.first_step, self.since = trainer.global_step, time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch, batch_idx: int) -> None:
        self.counts["waited"] += time.perf_counter() - self.batch_ended

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs, batch, batch_idx: int) -> None:
        self._count(batch)
        steps = trainer.global_step - self.first_step
        if steps > 0 and trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._rates(steps, trainer.world_size))
            if pl_module.device.type == "cuda":
                pl_module.log("train/memory_gb", torch.cuda.max_memory_allocated(pl_module.device) / 1e9)
            self._start_window(trainer)
        self.batch_ended = time.perf_counter()

    def _count(self, batch: dict) -> None:
        lengths, images = batch["lengths"], 0 if batch["pixel_values"] is None else len(batch["pixel_values"])
        for name, value in (
            ("samples", len(lengths)),
            ("text_only", len(lengths) - images),
            ("tokens", sum(lengths)),
            ("padded", batch["input_ids"].numel()),
            ("flops", self.flops.step(lengths, batch["supervised"], images)),
        ):
            self.counts[name] += value

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
