"""Which image tokens are attention sinks? The state of one is a large vector, whatever the image shows.

Where an image comes first, or nearly so, a causal LLM can make its first token the sink that other sequences have at
their beginning. A probe reads nothing from such a state. That the first patch reads worse than under bidirectional
attention is then a fact about the sink, not about context, and starvation is judged without this token, too. Knockouts
that block it show what a missing sink does.

Shapes: B = 1 image, T image tokens.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from probes.models.sites import layer_site
from probes.results.probe_run import ProbeRun

from .sinks import SINK_NORM

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM

IMAGES = 8


def sinks_of_run(run: ProbeRun, mllm: "FrozenMLLM | None" = None) -> dict[str, Any]:
    """Return :func:`measure_sinks` of a run's model, which may have been loaded, on the first images of its split."""
    dataset = run.dataset()
    images = [dataset[i]["image"] for i in range(min(IMAGES, len(dataset)))]
    return measure_sinks(mllm or run.mllm(), images)


def measure_sinks(mllm: "FrozenMLLM", images: Sequence[Image.Image]) -> dict[str, Any]:
    """Return how the first image token differs from others in each layer.

    Returns:
        {"images", "no_attention": why attention cannot be read, or "", "layers": [{"site", "first_norm": norm of the
        first image token, in medians of the image's tokens, "sinks": number of tokens from SINK_NORM on,
        "attention_to_first", "attention_to_text": shares of the other image tokens' attention, or None}]}; numbers are
        means over images, of norms the median.
    """
    sites = [layer_site(i) for i in range(1, len(mllm.layers) + 1)]
    no_attention = ""
    measured: dict[str, list[dict[str, float | None]]] = {site: [] for site in sites}
    for image in tqdm(images, desc=f"attention sinks, {mllm.image_attention}"):
        pixels = mllm.preprocess(image)
        states = mllm.states(pixels, sites)
        weights, no_attention = _attention(mllm, pixels)
        for site in sites:
            measured[site].append(norms_of(states[site]) | shares_of(weights.get(site)))
    layers = [{"site": site} | _summary(of_images) for site, of_images in measured.items()]
    return {"images": len(images), "no_attention": no_attention, "layers": layers}


def _attention(mllm: "FrozenMLLM", pixels: Tensor) -> tuple[Mapping[str, Tensor], str]:
    """Return the attention by layer, and ""; or nothing, and why it cannot be read."""
    try:
        return mllm.attention(pixels), ""
    except UserError as error:
        return {}, str(error)


def norms_of(states: Tensor) -> dict[str, float]:
    """Return the norm of the first token in medians of all, and the number of tokens from SINK_NORM on.

    Args:
        states: f[1, T, d].
    """
    norms = states[0].float().norm(dim=-1)
    norms = norms / norms.median()
    return {"first_norm": norms[0].item(), "sinks": (norms >= SINK_NORM).sum().item()}


def shares_of(weights: Tensor | None) -> dict[str, float | None]:
    """Return the attention of the other image tokens to the first one and to text.

    Args:
        weights: f[1, T, T], of which a row sums to 1 minus the attention to text; None if they cannot be read.
    """
    if weights is None:
        return {"attention_to_first": None, "attention_to_text": None}
    others = weights[0, 1:]
    return {
        "attention_to_first": others[:, 0].mean().item(),
        "attention_to_text": 1 - others.sum(-1).mean().item(),
    }


def _summary(of_images: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of norms and means of the other numbers over images."""

    def mean(key: str) -> float | None:
        values = [image[key] for image in of_images]
        return None if None in values else torch.tensor(values).double().mean().item()

    keys = ("sinks", "attention_to_first", "attention_to_text")
    norm = statistics.median(image["first_norm"] for image in of_images)
    return {"first_norm": norm} | {key: mean(key) for key in keys}
