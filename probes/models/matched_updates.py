"""Scale the layers of a random LLM or vision encoder so that each changes its input as much as the trained layer does.

The relative update of a layer is ||output - input|| / ||input||, a mean over image tokens. It is measured on training
images with the trained weights. The outputs of attention and MLP of each random layer are then multiplied by one
factor, from the first layer to the last, until its update is the trained one. For Llama this scales `o_proj` and
`down_proj`; for layers with a norm after attention and MLP (Gemma, GLM) it scales what the norm returns.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs

from .attention_weights import softmax_attention
from .families.sites import find_part
from .hooks import around, at_output
from .sites import layer_site

# on other images of the toy world the updates then differ from the trained ones by up to 5%
MATCH_IMAGES = 32
TOLERANCE = 1e-3  # relative; far below the difference between images
# Of states with 16 bits, whose rounding makes an update jump by a percent where it is small beside them
COARSE_TOLERANCE = 0.02
STEPS = 30  # an update is nearly proportional to its factor: two or three suffice


def layer_updates(mllm: nn.Module, pixels: Tensor) -> list[float]:
    """Return the relative update of each layer on images f[B, 3, H, W], from one forward."""
    states = mllm.states(pixels, mllm.layer_sites)
    return [
        _relative_update(states[before], states[after])
        for before, after in pairwise(mllm.layer_sites)
    ]


def _relative_update(before: Tensor, after: Tensor) -> float:
    before = before.float()
    after = after.float()
    change = (after - before).norm(dim=-1)
    return (change / before.norm(dim=-1)).mean().item()


def match_updates(
    mllm: nn.Module,
    pixels: Tensor,
    updates: Sequence[float],
    scales: list[float],
) -> None:
    """Edit the factors that :func:`scale_layers` applies until the layers have these relative updates on `pixels`.

    One forward matches all layers: each runs again, on the same inputs, until its update is the wanted one. Its
    attention runs once, since attention comes before all that the factor changes.

    Raises:
        UserError: An update cannot be reached, or states are NaN or infinite.
    """
    before: Tensor | None = None  # input of the layer that runs, at image tokens

    def states_of(hidden: Tensor | tuple) -> Tensor:
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden.index_select(1, mllm.image_positions.to(hidden.device))

    def match(
        layer: int,
        module: nn.Module,
        forward: Callable,
        *args,
        **kwargs,
    ) -> Tensor | tuple:
        nonlocal before
        if layer == 0:
            before = states_of(args or kwargs["hidden_states"])
        attended: list[Any] = []

        def attend(forward: Callable, *args, **kwargs) -> Any:
            if not attended:
                attended.append(forward(*args, **kwargs))
            return attended[0]

        wanted = updates[layer]
        with around(_attention(module), attend):
            for _ in range(STEPS):
                output = forward(*args, **kwargs)
                after = states_of(output)
                check_outputs("states", {layer_site(layer + 1): after})
                now = _relative_update(before.to(after.device), after)
                tolerance = TOLERANCE if after.dtype.itemsize > 2 else COARSE_TOLERANCE
                if abs(now - wanted) <= tolerance * wanted:
                    before = after
                    return output
                if now == 0:  # all that is added is lost in rounding
                    break
                scales[layer] *= wanted / now
        finer = "" if after.dtype.itemsize > 2 else "float32 (model.dtype), or "
        raise UserError(
            f"layer {layer + 1} of the random model changes its input by {now:.3g}, the trained one by {wanted:.3g}: "
            f"the updates of this family cannot be matched; use {finer}match: permuted"
        )

    with ExitStack() as stack:
        for layer, module in enumerate(mllm.layers):
            stack.enter_context(around(module, partial(match, layer, module)))
        mllm.states(pixels, [layer_site(len(updates))])


def scale_layers(mllm: nn.Module, scales: Sequence[float]) -> ExitStack:
    """Multiply what attention and MLP of each layer add to the states by the layer's factor, read at each forward.

    Returns:
        A stack that, closed, ends this.
    """

    def scale(layer: int, states: Tensor) -> Tensor:
        return states * scales[layer]

    with ExitStack() as stack:
        for layer, module in enumerate(mllm.layers):
            for branch in branch_outputs(module):
                stack.enter_context(at_output(branch, partial(scale, layer)))
        return stack.pop_all()


def _attention(layer: nn.Module) -> nn.Module:
    """Return the attention of a layer, or what it has in place of it."""
    found = softmax_attention(layer) or getattr(layer, "linear_attn", None)
    return found or getattr(layer, "attn", None) or layer.conv  # timm, LFM2


def branch_outputs(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer whose outputs are added to its input, for attention and for the MLP."""
    outputs = [find_part(layer, part) for part in ("attn", "mlp")]
    if None in outputs:
        raise UserError(
            f"{type(layer).__name__} has no known attention or MLP to scale; use match: permuted"
        )
    return outputs
