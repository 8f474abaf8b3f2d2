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
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_bidir.common.errors import UserError
from llava_bidir.common.hf import check_outputs, read_training

from .attention_weights import softmax_attention
from .families.encoders import AnyFamily
from .families.layer_parts import find_part
from .families.modules import why_unmatched
from .hooks import around, at_output
from .sites import layer_site

MATCHES = ("none", "update", "permuted")
DRAW_SEEDS = 1_000_003  # between the seeds of two draws, so that draws of neighbouring seeds differ
# on other images of the toy world the updates then differ from the trained ones by up to 5%
MATCH_IMAGES = 32
FINE_TOLERANCE = 1e-3  # relative; far below the difference between images
# Of states with 16 bits, whose rounding makes an update jump by a percent where it is small beside them
COARSE_TOLERANCE = 0.02
MATCH_STEPS = 30  # an update is nearly proportional to its factor: two or three suffice


@dataclass(frozen=True, kw_only=True)
class Control:
    """Random weights in place of trained ones, as options of :func:`probes.load`.

    Args:
        untrained: Parts to replace by random weights, as controls without training: "adapter", "llm"; of a bare encoder
            "encoder".
        match: How a random LLM or encoder resembles the trained one: "none", "update" or "permuted".
        draw: Number of the draw of random weights, for several controls with one seed.
        match_images: Images on which "update" matches the layers' updates: training images.
        update_scales: The factors of an earlier match (`FrozenMLLM.update_scales`), instead of `match_images`.
        seed: Seed of the random weights.
    """

    untrained: Sequence[str] = ()
    match: str = "none"
    draw: int = 0
    match_images: Sequence[Image.Image] = ()
    update_scales: Sequence[float] | None = None
    seed: int = 0

    def check_control(self, family: AnyFamily, config: PreTrainedConfig) -> None:
        """Raise a UserError unless these are random weights that a model of this family and config can have."""
        why = why_unmatched(config)
        if why and self.match == "update":
            raise UserError(f"{why}; pass match='permuted' (--model.match permuted)")
        kind = "a bare vision encoder"
        layers = "encoder"
        if family.has_llm:
            kind = "an MLLM"
            layers = "LLM"
        if unknown := set(self.untrained) - {*family.parts}:
            raise UserError(
                f"unknown part {min(unknown)!r} in untrained; expected {', '.join(family.parts)}, the parts of {kind}"
            )
        if self.draw and not self.untrained:
            raise UserError(
                f"draw {self.draw} is one of random weights; add their part to untrained"
            )
        if self.match not in MATCHES:
            raise UserError(f"unknown match {self.match!r}; expected {', '.join(MATCHES)}")
        if self.match != "none" and family.layers_part not in self.untrained:
            raise UserError(
                f"match {self.match!r} describes a random {layers}; add {family.layers_part} to untrained"
            )
        if self.match == "update" and not len(self.match_images) and self.update_scales is None:
            raise UserError(
                "match 'update' needs images to measure updates on; pass match_images, e.g. 32 training images"
            )

    def replace_weights(self, mllm: nn.Module) -> ExitStack:
        """Replace the weights of a :class:`FrozenModel`.

        Returns:
            A stack that, closed, removes the hooks that scale the layers, if their updates are matched.
        """
        pixels = None
        if self.match == "update" and self.update_scales is None:
            pixels = mllm.preprocess(self.match_images)
            updates = layer_updates(mllm, pixels)
        self._draw_weights(mllm)
        if self.match != "update":
            return ExitStack()
        mllm.update_scales = [1.0] * len(mllm.layers)
        if self.update_scales is not None:
            mllm.update_scales = list(self.update_scales)
        with scale_layers(mllm, mllm.update_scales) as hooks:
            if pixels is not None:
                match_updates(mllm, pixels=pixels, updates=updates, scales=mllm.update_scales)
            return hooks.pop_all()

    def _draw_weights(self, mllm: nn.Module) -> None:
        """Draw the weights on the CPU, whose random numbers are the same everywhere.

        A model that is spread over devices stays where it is. Modules that are not replaced are not moved: states that
        were read before stay valid.
        """
        device = mllm.device
        modules_of_part = mllm.family.random_modules(mllm.model, self.match)
        replaced = [(part, module) for part in self.untrained for module in modules_of_part[part]]
        is_spread = {parameter.device for parameter in mllm.parameters()} != {device}
        try:
            for _, module in replaced:
                if not is_spread:
                    module.cpu()
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(self.seed + DRAW_SEEDS * self.draw)
                for part, module in replaced:
                    if self.match == "permuted" and part == mllm.family.layers_part:
                        permute_weights(module)
                    else:
                        initialize(mllm, part, module)
        finally:
            for _, module in replaced:
                if not is_spread:
                    module.to(device)


def permute_weights(layers: nn.Module) -> None:
    """Put the weights of each matrix into random order; vectors (norms, biases) stay."""
    for parameter in layers.parameters():
        if parameter.ndim > 1:
            order = torch.randperm(parameter.numel()).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def initialize(mllm: nn.Module, part: str, replaced: nn.Module) -> None:
    """Draw the weights of a module anew: of the adapter as torch does, of layers as transformers does.

    Raises:
        UserError: The initialisation of this kind of model sets a weight to zero.
    """
    model = mllm.model
    owner = model
    if part == "llm":
        owner = mllm.family.decoder_of(model)
    # else transformers keeps weights from a checkpoint, also those that a module draws for its children (CLIP)
    for parameter in replaced.parameters():
        parameter._is_hf_initialized = False
    for module in replaced.modules():
        if part == "adapter" and hasattr(module, "reset_parameters"):
            module.reset_parameters()
            continue
        for parameter in module.parameters(recurse=False):  # else those that a parent has drawn
            parameter._is_hf_initialized = False
        owner._init_weights(module)
    for name, parameter in replaced.named_parameters():
        is_bias = "bias" in name.rpartition(".")[2]  # of relative positions, in BEiT
        if parameter.ndim > 1 and not is_bias and not parameter.any():
            raise UserError(
                f"untrained {part}: the initialisation of this model sets {name} to zero, so that all states "
                "would be equal; leave this part trained"
            )
    scale = read_training(Path(model.name_or_path)).get("adapter_init_scale")
    if part == "adapter" and scale is not None:  # of this project's adapters, and no others
        replaced.linear_2.weight *= scale


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

    def match(layer: int, module: nn.Module, forward: Callable, *args, **kwargs) -> Tensor | tuple:
        nonlocal before
        if layer == 0:
            before = _image_states(mllm, args or kwargs["hidden_states"])
        attended: list[Any] = []

        def attend(forward: Callable, *args, **kwargs) -> Any:
            if not attended:
                attended.append(forward(*args, **kwargs))
            return attended[0]

        wanted = updates[layer]
        with around(_attention(module), attend):
            for _ in range(MATCH_STEPS):
                output = forward(*args, **kwargs)
                after = _image_states(mllm, output)
                check_outputs("states", {layer_site(layer + 1): after})
                now = _relative_update(before.to(after.device), after)
                tolerance = FINE_TOLERANCE
                if after.dtype.itemsize <= 2:
                    tolerance = COARSE_TOLERANCE
                if abs(now - wanted) <= tolerance * wanted:
                    before = after
                    return output
                if now == 0:  # all that is added is lost in rounding
                    break
                scales[layer] *= wanted / now
        advice = "match: permuted"
        if after.dtype.itemsize <= 2:
            advice = f"float32 (model.dtype), or {advice}"
        raise UserError(
            f"layer {layer + 1} of the random model changes its input by {now:.3g}, the trained one by {wanted:.3g}: "
            f"the updates of this family cannot be matched; use {advice}"
        )

    with ExitStack() as stack:
        for layer, module in enumerate(mllm.layers):
            stack.enter_context(around(module, partial(match, layer, module)))
        mllm.states(pixels, [layer_site(len(updates))])


def _image_states(mllm: nn.Module, hidden: Tensor | tuple) -> Tensor:
    """Return the states of the image tokens of what a layer receives or returns."""
    if isinstance(hidden, tuple):
        hidden = hidden[0]
    return hidden.index_select(1, mllm.image_positions.to(hidden.device))


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
    attention = softmax_attention(layer) or getattr(layer, "linear_attn", None)
    return attention or getattr(layer, "attn", None) or layer.conv  # timm, LFM2


def branch_outputs(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of a layer whose outputs are added to its input, for attention and for the MLP."""
    outputs = [find_part(layer, part) for part in ("attn", "mlp")]
    if None in outputs:
        raise UserError(
            f"{type(layer).__name__} has no known attention or MLP to scale; use match: permuted"
        )
    return outputs
