"""FLOPs of a training step, counted from the model's own layers, and the peak of a device, for MFU.

A multiply-add is two FLOPs. What is computed twice (gradient checkpointing) counts once, padding not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
