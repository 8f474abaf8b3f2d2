"""Floating-point operations that a training step needs.

The share of a device's is the model FLOPs utilisation (MFU). Source: Chowdhery et al., PaLM, 2022, appendix B: matrix
products alone, without recomputation and padding; attention counts all pairs of tokens, also those that a causal mask
hides. A product of n x k and k x m has 2 n k m operations.

Unlike there, the parts of this model differ: frozen weights have no gradient, the encoder a backward pass only where
it trains, and the head sees supervised tokens only.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from llava_bidir.model.modeling_llava_bidir import LlavaBidirForConditionalGeneration
from llava_bidir.model.trainable import encoder_layers, trains


class ModelFlops(NamedTuple):
    """Operations of a training step, forward and backward.

    Args:
        image: Of an image, in encoder and adapter.
        token: Of a token, in the LLM's layers without attention.
        pair: Of a pair of tokens, in the attention of all layers; a sample of N tokens has N^2.
        supervised: Of a supervised token, in the head.
    """

    image: float
    token: float
    pair: float
    supervised: float

    def of_batch(self, images: int, lengths: Sequence[int], supervised: int) -> float:
        """Return the operations of a micro-batch.

        Args:
            images: Number of images.
            lengths: Tokens of each sample, without padding.
            supervised: Number of supervised tokens.
        """
        pairs = sum(length**2 for length in lengths)
        return (
            self.image * images
            + self.token * sum(lengths)
            + self.pair * pairs
            + self.supervised * supervised
        )


def count_flops(model: LlavaBidirForConditionalGeneration, image: Tensor) -> ModelFlops:
    """Return what a step needs with the weights that train now.

    Args:
        model: Model in training.
        image: Pixels f[1, 3, H, W] of any image; encoder and adapter are run on it.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = model.model.language_model.modules()
    return ModelFlops(
        image=_count_image(model, image),
        token=sum(_count_linear(layer) for layer in layers if isinstance(layer, nn.Linear)),
        # scores and sums of values; the gradient has twice as many products: each factor has one
        pair=config.num_hidden_layers * 2 * 2 * width * 3,
        supervised=_count_linear(model.get_output_embeddings()),
    )


@torch.no_grad()
def _count_image(model: LlavaBidirForConditionalGeneration, image: Tensor) -> float:
    """Return the operations of encoder and adapter, and those of their backward pass."""
    with FlopCounterMode(display=False) as counter:
        output = model.get_image_features(image)
    tokens = len(torch.cat(output.pooler_output))
    adapter = model.model.multi_modal_projector
    forward = counter.get_total_flops()
    if not adapter.linear_1.weight.requires_grad:
        return forward
    tower = model.model.vision_tower
    first = 2 * _size(adapter.linear_1.weight)
    if trains(tower):  # else its features need no gradient
        first *= 2
    second = 2 * 2 * _size(adapter.linear_2.weight)
    of_tower = _count_tower_backward(
        tower, patches=tokens, tokens=output.last_hidden_state.shape[1]
    )
    return forward + tokens * (first + second) + of_tower


def _count_tower_backward(tower: PreTrainedModel, patches: int, tokens: int) -> int:
    """Return the operations of an image's backward pass in what trains of a vision tower.

    Args:
        tower: The tower.
        patches: Of the image.
        tokens: In the tower's blocks, CLS and registers included.
    """
    # pixels need no gradient
    embeddings = (m for m in tower.modules() if isinstance(m, nn.Conv2d) and trains(m))
    flops = sum(2 * _size(module.weight) * patches for module in embeddings)
    for block in filter(trains, encoder_layers(tower)):
        linear = (layer for layer in block.modules() if isinstance(layer, nn.Linear))
        flops += sum(2 * 2 * _size(layer.weight) * tokens for layer in linear)
        # scores and sums of values, each with two gradients
        flops += 2 * 2 * 2 * tower.config.hidden_size * tokens**2
    return flops


def _count_linear(layer: nn.Linear) -> int:
    """Return the operations of a linear layer above the adapter for one token: forward, and gradients."""
    return 2 * _size(layer.weight) * (2 + layer.weight.requires_grad)


def _size(weight: Tensor) -> int:
    """Return the number of entries, of which ZeRO-3 leaves none in the parameter itself."""
    return getattr(weight, "ds_numel", weight.numel())
