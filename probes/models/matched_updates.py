"""Scale the layers of a random LLM so that each changes its input as much as the trained layer does.

The relative update of a layer is ||output - input|| / ||input||, a mean over image tokens. It is measured on training
images with the trained weights. The outputs of attention and MLP of each random layer are then multiplied by one
factor, from the first layer to the last, until its update is the trained one. For Llama this scales `o_proj` and
`down_proj`; for layers with a norm after attention and MLP (Gemma, GLM) it scales what the norm returns.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from llava_bidir.common.errors import UserError

from .frozen_mllm import FrozenMLLM
from .sites import ADAPTER, layer_site

MATCH_IMAGES = 32  # on other images of the toy world the updates then differ from the trained ones by up to 5%
TOLERANCE = 1e-3  # relative; far below the difference between images
STEPS = 30  # an update is nearly proportional to its factor: two or three suffice


def layer_updates(mllm: FrozenMLLM, pixels: Tensor) -> list[float]:
    """Return the relative update of each decoder layer on images f[B, 3, H, W], from one forward."""
    layers = [site for site in mllm.sites if site == ADAPTER or site.startswith("layer_")]
    states = mllm.states(pixels, layers)
    return [_relative_update(states[before], states[after]) for before, after in pairwise(layers)]


def _relative_update(before: Tensor, after: Tensor) -> float:
    before, after = before.float(), after.float()
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()


def match_updates(mllm: FrozenMLLM, pixels: Tensor, updates: Sequence[float]) -> list[float]:
    """Scale the layers to these relative updates on `pixels`, and return the factors for :func:`scale_layers`.

    Raises:
        UserError: An update cannot be reached.
    """
    scales = [1.0] * len(updates)
    scale_layers(mllm, scales)
    for layer, wanted in enumerate(updates):
        sites = [layer_site(layer) if layer else ADAPTER, layer_site(layer + 1)]
        for _ in range(STEPS):
            mllm.clear_prefix_cache()
            now = _relative_update(*mllm.states(pixels, sites).values())
            if abs(now - wanted) <= TOLERANCE * wanted:
                break
            scales[layer] *= wanted / now
        else:
            raise UserError(
                f"layer {layer + 1} of the random LLM changes its input by {now:.3g}, the trained one by {wanted:.3g}: "
                "the updates of this family cannot be matched; use match: permuted"
            )
    return scales


def scale_layers(mllm: FrozenMLLM, scales: Sequence[float]) -> None:
    """Multiply what attention and MLP of each layer add to the states by the layer's factor.

    The factors are read at each forward; call `clear_prefix_cache` after changing them.
    """
    for layer, module in enumerate(mllm.decoder.layers):
        for branch in branch_outputs(module):
            branch.register_forward_hook(partial(_scaled_output, scales, layer))
    mllm.clear_prefix_cache()


def _scaled_output(scales: Sequence[float], layer: int, module: nn.Module, args: tuple, output):
    if isinstance(output, tuple):
        return (output[0] * scales[layer], *output[1:])
    return output * scales[layer]


def branch_outputs(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a decoder layer whose outputs are added to its input, for attention and for the MLP."""
    # Where the norm before the MLP has a name of its own, `post_attention_layernorm` follows attention.
    after_attention = ("post_attention_layernorm",) if hasattr(layer, "pre_feedforward_layernorm") else ()
    attention = ("post_self_attn_layernorm", *after_attention, "self_attn", "linear_attn")
    mlp = ("post_mlp_layernorm", "post_feedforward_layernorm", "mlp")
    outputs = [
        next((getattr(layer, name) for name in names if hasattr(layer, name)), None) for names in (attention, mlp)
    ]
    if None in outputs:
        raise UserError(f"{type(layer).__name__} has no known attention or MLP to scale; use match: permuted")
    return outputs
