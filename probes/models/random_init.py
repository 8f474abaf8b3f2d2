"""Random weights in place of trained ones: controls that show what the architecture does without training.

A re-initialised LLM hardly changes its input: its layers' outputs are small. It controls for nothing that strong layers
do, such as mixing neighbouring patches. Matched controls change the states as much as the trained layers:

    none       as transformers initialises a model before training
    update     re-initialised layers, scaled to the trained layers' relative updates (`matched_updates.py`)
    permuted   the trained weights of each matrix in random order

Matched controls replace the decoder layers only. The prompt's embeddings and the final norm stay trained, as inputs and
read-out of the layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from llava_bidir.common.arguments import check_is_list
from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.errors import UserError

from .families import Family
from .matched_updates import layer_updates, match_updates, scale_layers

MATCHES = ("none", "update", "permuted")
DRAW_SEEDS = 1_000_003  # between the seeds of two draws, so that draws of neighbouring seeds differ


def check_control(parts: Sequence[str], match: str, images: Sequence, scales: Sequence[float] | None) -> None:
    """Raise a UserError unless `parts` and `match`, with images or factors to match updates, describe a control."""
    check_is_list("untrained", parts, "['llm']")
    if unknown := set(parts) - {"adapter", "llm"}:
        raise UserError(f"unknown part {min(unknown)!r} in untrained; expected adapter, llm")
    if match not in MATCHES:
        raise UserError(f"unknown match {match!r}; expected {', '.join(MATCHES)}")
    if match != "none" and "llm" not in parts:
        raise UserError(f"match {match!r} describes a random LLM; add llm to untrained")
    if match == "update" and not len(images) and scales is None:
        raise UserError("match 'update' needs images to measure updates on; pass match_images, e.g. 32 training images")


def drawn_modules(
    model: PreTrainedModel, family: Family, parts: Sequence[str], match: str
) -> dict[str, list[nn.Module]]:
    """Return the modules whose weights are replaced, by part: "adapter" and "llm"."""
    decoder = family.decoder_of(model)
    modules = {"adapter": family.adapter_of(model), "llm": [decoder if match == "none" else decoder.layers]}
    return {part: modules[part] for part in parts}


def reinitialize(model: PreTrainedModel, family: Family, parts: Sequence[str], seed: int, match: str = "none") -> None:
    """Replace the weights of "adapter" (as torch draws them, times the scale in training.json) or "llm" (see above).

    Raises:
        UserError: The initialisation of this kind of model sets a weight to zero.
    """
    decoder, modules = family.decoder_of(model), drawn_modules(model, family, parts, match)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in parts:
            if part == "llm" and match == "permuted":
                permute_weights(decoder.layers)
                continue
            for module in (m for top in modules[part] for m in top.modules()):
                if part == "adapter" and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                else:
                    for parameter in module.parameters(recurse=False):
                        parameter._is_hf_initialized = False  # else transformers keeps weights from a checkpoint
                    (decoder if part == "llm" else model)._init_weights(module)
            for name, parameter in (pair for top in modules[part] for pair in top.named_parameters()):
                if parameter.ndim > 1 and not parameter.any():
                    raise UserError(
                        f"untrained {part}: the initialisation of this model sets {name} to zero, so that all states "
                        "would be equal; leave this part trained"
                    )
        training = Path(model.name_or_path) / "training.json"
        if "adapter" in parts and training.is_file():
            modules["adapter"][0].linear_2.weight *= read_json(training).get("adapter_init_scale", 1.0)


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
    """Make an MLLM a control with random weights; the arguments are those of :func:`probes.load`.

    Returns:
        A stack that, closed, removes the hooks that scale the layers, if their updates are matched.
    """
    device, pixels = mllm.device, None
    if match == "update" and scales is None:
        pixels = mllm.preprocess(images)
        updates = layer_updates(mllm, pixels)
    # The random numbers of the CPU are the same everywhere; a model that is spread over devices stays where it is. The
    # other modules are not moved: states that were read before stay valid.
    together = {parameter.device for parameter in mllm.parameters()} == {device}
    drawn = drawn_modules(mllm.model, mllm.family, parts, match).values() if together else ()
    moved = [module for modules in drawn for module in modules]
    try:
        for module in moved:
            module.cpu()
        reinitialize(mllm.model, mllm.family, parts, seed + DRAW_SEEDS * draw, match)
    finally:
        for module in moved:
            module.to(device)
    mllm.clear_prefix_cache()
    if match != "update":
        return ExitStack()
    mllm.update_scales = [1.0] * len(mllm.decoder.layers) if scales is None else list(scales)
    with scale_layers(mllm, mllm.update_scales) as hooks:
        if pixels is not None:
            match_updates(mllm, pixels, updates, mllm.update_scales)
        return hooks.pop_all()


@contextmanager
def random_layers(
    mllm: nn.Module, match: str = "update", draw: int = 0, *, match_images: Sequence[Image.Image] = ()
) -> Iterator[None]:
    """Give an MLLM a random LLM while the context is open, and its trained weights back afterwards.

    Inside, `mllm` is what ``probes.load(..., untrained=["llm"], match=match, draw=draw, ...)`` returns, without loading
    a checkpoint again. The random weights are beside the trained ones, on the same device. ::

        for draw in range(3):
            with random_layers(mllm, draw=draw, match_images=images):
                states = mllm.states(pixels)

    Args:
        mllm: MLLM with a trained LLM, from :func:`probes.load`.
        match: How the random LLM resembles the trained one: "none", "update" or "permuted" (random_init.py).
        draw: Number of the draw.
        match_images: Images on which "update" matches the layers' updates: training images.

    Raises:
        UserError: An argument is invalid, or the LLM's updates are matched already.
    """
    check_control(["llm"], match, match_images, None)
    if mllm.update_scales is not None:
        raise UserError("the LLM has random layers already; leave their context, or load the trained model")
    decoder = mllm.decoder
    parts = dict(decoder.named_children()) if match == "none" else {"layers": decoder.layers}
    try:
        for name, trained in parts.items():
            setattr(decoder, name, deepcopy(trained))
        mllm.model.tie_weights()
        with replace_weights(mllm, ["llm"], match, draw, 0, match_images, None):
            yield
    finally:
        mllm.update_scales = None
        for name, trained in parts.items():
            setattr(decoder, name, trained)
        mllm.model.tie_weights()
        mllm.clear_prefix_cache()
