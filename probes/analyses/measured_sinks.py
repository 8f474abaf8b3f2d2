"""Which image tokens are attention sinks? The state of one is a large vector, whatever the image shows.

Where an image comes first, or nearly so, a causal LLM can make its first token the sink that other sequences have at
their beginning. A probe reads nothing from such a state. That the first patch reads worse than under bidirectional
attention is then a fact about the sink, not about context, and starvation is judged without this token, too. Knockouts
that block it show what a missing sink does.

Shapes: B = 1 image, T image tokens.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from probes.models.sites import layer_site
from probes.runs.probe_run import ProbeRun

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
        {"images", "layers": [{"site", "first_norm": norm of the first image token, in medians of the image's tokens,
        "sinks": number of tokens from SINK_NORM on}]}; the median and the mean over images.
    """
    sites = [layer_site(i) for i in range(1, len(mllm.layers) + 1)]
    measured: dict[str, list[dict[str, float]]] = {site: [] for site in sites}
    for image in tqdm(images, desc=f"attention sinks, {mllm.image_attention}"):
        states = mllm.states(mllm.preprocess(image), sites)
        for site in sites:
            measured[site].append(norms_of(states[site]))
    layers = [{"site": site} | _summary(of_images) for site, of_images in measured.items()]
    return {"images": len(images), "layers": layers}


def norms_of(states: Tensor) -> dict[str, float]:
    """Return the norm of the first token in medians of all, and the number of tokens from SINK_NORM on.

    Args:
        states: f[1, T, d].
    """
    norms = states[0].float().norm(dim=-1)
    norms = norms / norms.median()
    return {"first_norm": norms[0].item(), "sinks": (norms >= SINK_NORM).sum().item()}


def _summary(of_images: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of norms and the mean number of sinks over images."""
    counts = torch.tensor([image["sinks"] for image in of_images])
    return {
        "first_norm": statistics.median(image["first_norm"] for image in of_images),
        "sinks": counts.double().mean().item(),
    }
