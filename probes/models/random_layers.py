"""Replace trained weights of a loaded MLLM by random ones: for good, or its LLM for a while."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

from llava_bidir.common.errors import UserError

from .matched_updates import layer_updates, match_updates, scale_layers
from .random_init import check_control, reinitialize

DRAW_SEEDS = 1_000_003  # between the seeds of two draws, so that draws of neighbouring seeds differ


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
    # The random numbers of the CPU are the same everywhere; a model that is spread over devices stays where it is.
    move = {parameter.device for parameter in mllm.parameters()} == {device}
    try:
        if move:
            mllm.cpu()
        reinitialize(mllm.model, mllm.family, parts, seed + DRAW_SEEDS * draw, match)
    finally:
        if move:
            mllm.to(device)
    mllm.clear_prefix_cache()
    with ExitStack() as hooks:
        if match == "update":
            mllm.update_scales = [1.0] * len(mllm.decoder.layers) if scales is None else list(scales)
            for hook in scale_layers(mllm, mllm.update_scales):
                hooks.callback(hook.remove)
        if pixels is not None:
            match_updates(mllm, pixels, updates, mllm.update_scales)
        return hooks.pop_all()


@contextmanager
def random_layers(
    mllm: nn.Module,
    match: str = "update",
    draw: int = 0,
    *,
    match_images: Sequence[Image.Image] = (),
    update_scales: Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Give an MLLM a random LLM while the context is open, and its trained weights back afterwards.

    Inside, `mllm` is what ``probes.load(..., untrained=["llm"], match=match, draw=draw, ...)`` returns, without loading
    a checkpoint again. The trained weights of the LLM are kept beside the random ones, on the same device. States that
    were read before are not accepted as `known` afterwards. ::

        for draw in range(3):
            with random_layers(mllm, draw=draw, match_images=images):
                states = mllm.states(pixels)

    Args:
        mllm: MLLM with a trained LLM, from :func:`probes.load`.
        match: How the random LLM resembles the trained one: "none", "update" or "permuted" (random_init.py).
        draw: Number of the draw.
        match_images: Images on which "update" matches the layers' updates: training images.
        update_scales: The factors of an earlier match of this draw, instead of `match_images`.
        seed: Seed of the random weights.

    Raises:
        UserError: An argument is invalid, or the LLM's updates are matched already.
    """
    check_control(["llm"], match, match_images, update_scales)
    if mllm.update_scales is not None:
        raise UserError("the LLM has random layers already; leave their context, or load the trained model")
    module = mllm.decoder if match == "none" else mllm.decoder.layers
    tensors = lambda: dict([*module.named_parameters(), *module.named_buffers()])
    trained: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors().items()}
    try:
        with replace_weights(mllm, ["llm"], match, draw, seed, match_images, update_scales):
            yield
    finally:
        mllm.update_scales = None
        with torch.no_grad():
            for name, tensor in tensors().items():
                tensor.copy_(trained[name])
        mllm.clear_prefix_cache()
