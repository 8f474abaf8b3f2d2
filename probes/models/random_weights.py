"""Random weights in place of trained ones: controls that show what the architecture does without training.

A re-initialised LLM hardly changes its input: its layers' outputs are small. It controls for nothing that strong layers
do, such as mixing neighbouring patches. Matched controls change the states as much as the trained layers:

    none       as transformers initialises a model before training
    update     re-initialised layers, scaled to the trained layers' relative updates
    permuted   the trained weights of each matrix in random order

Matched controls replace the layers only. The prompt's embeddings and the final norm stay trained, as inputs and
read-out of the layers. Of a bare vision encoder, all controls do: its patch embeddings stay trained.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs, read_training
from probes.models.attention_weights import softmax_attention
from probes.models.families import EncoderFamily, Family
from probes.models.families.modules import why_unmatched
from probes.models.families.sites import find_part
from probes.models.hooks import around, at_output
from probes.models.sites import layer_site

MATCHES = ("none", "update", "permuted")
DRAW_SEEDS = 1_000_003  # between the seeds of two draws, so that draws of neighbouring seeds differ


def check_control(
    family: Family | EncoderFamily,
    parts: Sequence[str],
    match: str,
    images: Sequence,
    scales: Sequence[float] | None,
    draw: int,
) -> None:
    """Raise a UserError unless `parts`, `match`, with images or factors to match updates, and `draw` are a control."""
    if unknown := set(parts) - {*family.parts}:
        kind = "an MLLM" if family.has_llm else "a bare vision encoder"
        raise UserError(
            f"unknown part {min(unknown)!r} in untrained; expected {', '.join(family.parts)}, the parts of {kind}"
        )
    if draw and not parts:
        raise UserError(f"draw {draw} is one of random weights; add their part to untrained")
    if match not in MATCHES:
        raise UserError(f"unknown match {match!r}; expected {', '.join(MATCHES)}")
    if match != "none" and family.layers_part not in parts:
        random = "LLM" if family.has_llm else "encoder"
        raise UserError(
            f"match {match!r} describes a random {random}; add {family.layers_part} to untrained"
        )
    if match == "update" and not len(images) and scales is None:
        raise UserError(
            "match 'update' needs images to measure updates on; pass match_images, e.g. 32 training images"
        )


def check_matches(config: PreTrainedConfig, match: str) -> None:
    """Raise a UserError if layers are to be matched whose attention and MLP are not known."""
    why = why_unmatched(config)
    if why and match == "update":
        raise UserError(f"{why}; pass match='permuted' (--model.match permuted)")


def reinitialize(
    model: PreTrainedModel,
    family: Family | EncoderFamily,
    parts: Sequence[str],
    seed: int,
    match: str = "none",
) -> None:
    """Replace the weights of "adapter" (as torch draws them, times the scale in training.json) or of the layers.

    Raises:
        UserError: The initialisation of this kind of model sets a weight to zero.
    """
    modules = family.random_modules(model, match)
    owner = family.decoder_of(model) if family.has_llm else model
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            if part == family.layers_part and match == "permuted":
                for top in modules[part]:
                    permute_weights(top)
                continue
            # else transformers keeps weights from a checkpoint, also those that a module draws for its children (CLIP)
            for parameter in (p for module in modules[part] for p in module.parameters()):
                parameter._is_hf_initialized = False
            for module in (m for top in modules[part] for m in top.modules()):
                if part == "adapter" and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    for parameter in module.parameters(recurse=False):
                        # else transformers keeps weights from a checkpoint
                        parameter._is_hf_initialized = False
                    (owner if part == "llm" else model)._init_weights(module)
            for name, parameter in (
                pair for top in modules[part] for pair in top.named_parameters()
            ):
                is_bias = "bias" in name.rpartition(".")[2]  # of relative positions, in BEiT
                if parameter.ndim > 1 and not is_bias and not parameter.any():
                    raise UserError(
                        f"untrained {part}: the initialisation of this model sets {name} to zero, so that all states "
                        "would be equal; leave this part trained"
                    )
        scale = read_training(Path(model.name_or_path)).get("adapter_init_scale")
        if "adapter" in parts and scale is not None:  # of this project's adapters, and no others
            modules["adapter"][0].linear_2.weight *= scale


def permute_weights(layers: nn.Module) -> None:
    """Put the weights of each matrix into random order; vectors (norms, biases) stay."""
    for parameter in layers.parameters():
        if parameter.ndim > 1:
            order = torch.randperm(parameter.numel()).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def replace_weights(
    mllm: nn.Module,
    parts: Sequence[str],
    match: str,
    draw: int,
    seed: int,
    images: Sequence[Image.Image],
    scales: Sequence[float] | None,
) -> ExitStack:
    """Make a model a control with random weights; the arguments are those of :func:`probes.load`.

    Returns:
        A stack that, closed, removes the hooks that scale the layers, if their updates are matched.
    """
    device = mllm.device
    pixels = None
    if match == "update" and scales is None:
        pixels = mllm.preprocess(images)
        updates = layer_updates(mllm, pixels)
    # The random numbers of the CPU are the same everywhere; a model that is spread over devices stays where it is. The
    # other modules are not moved: states that were read before stay valid.
    together = {parameter.device for parameter in mllm.parameters()} == {device}
    drawn = mllm.family.random_modules(mllm.model, match) if together else {}
    moved = [module for part in parts for module in drawn.get(part, ())]
    try:
        for module in moved:
            module.cpu()
        reinitialize(
            mllm.model, family=mllm.family, parts=parts, seed=seed + DRAW_SEEDS * draw, match=match
        )
    finally:
        for module in moved:
            module.to(device)
    if match != "update":
        return ExitStack()
    mllm.update_scales = [1.0] * len(mllm.layers) if scales is None else list(scales)
    with scale_layers(mllm, mllm.update_scales) as hooks:
        if pixels is not None:
            match_updates(mllm, pixels=pixels, updates=updates, scales=mllm.update_scales)
        return hooks.pop_all()


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
    mllm: nn.Module, pixels: Tensor, updates: Sequence[float], scales: list[float]
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

    def match(layer: int, module: nn.Module, forward: Callable, *args, **kwargs) -> Tensor | tuple:
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
