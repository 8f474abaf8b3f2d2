"""`probes sinks`: which image tokens are attention sinks? The state of one is a large vector, whatever the image shows.

Where an image comes first, or nearly so, a causal LLM can make its first token the sink that other sequences have at
their beginning. A probe reads nothing from such a state. That the first patch reads worse than under bidirectional
attention is then a fact about the sink, not about context, and starvation is judged without this token, too. Knockouts
and cut routes that block it show what a missing sink does: what is cut off from a sink attends elsewhere by force.

The states that a layer writes are the keys of the next one: a knockout of layer 5 meets the sinks of layer_04.

sinks.json: "images", "layers": [{"site", "first_norm": norm of the first image token, in medians of the image's tokens,
"sinks": number of tokens from SINK_NORM on}], the median and the mean over images.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from llava_bidir.common.cli import Count
from probes.models.sites import layer_number, layer_site

from .analysis import Analysis, Result, RunOptions

if TYPE_CHECKING:  # this module answers `probes --help`
    from PIL import Image
    from torch import Tensor

    from probes.models.frozen_mllm import FrozenMLLM
    from probes.runs.read import ProbeRun

# A state is a sink's from this multiple of the median norm. In SmolLM2-135M sinks have 159 times the median, the
# largest of other tokens 3 to 5 times.
SINK_NORM = 10.0
IMAGES = 8


class LayerSinks(TypedDict):
    """Image tokens with large norms at a layer, in medians of all."""

    site: str
    first_norm: float  # of the first token
    sinks: float  # how many tokens


class Sinks(TypedDict):
    """Content of sinks.json."""

    images: int
    layers: list[LayerSinks]


NOT_MEASURED: Sinks = {"images": 0, "layers": []}


@dataclass(frozen=True, kw_only=True)
class SinksOptions(RunOptions):
    """What to measure.

    Args:
        limit: Number of images to read.
    """

    limit: Count = IMAGES


def measure(run: "ProbeRun", options: SinksOptions) -> Result:
    """Return the norms of the run's model on the first images of its split."""
    return Result(measure_sinks(run.mllm(), first_images(run, options.limit)))


def first_images(run: "ProbeRun", limit: int) -> list["Image.Image"]:
    """Return the first images of a run's split, `limit` at most."""
    dataset = run.dataset()
    return [dataset[i]["image"] for i in range(min(limit, len(dataset)))]


def measure_sinks(mllm: "FrozenMLLM", images: Sequence["Image.Image"]) -> Sinks:
    """Return how the first image token differs from others in each layer."""
    sites = [layer_site(i) for i in range(1, len(mllm.layers) + 1)]
    norms = {site: [] for site in sites}
    for image in images:
        states = mllm.states(mllm.preprocess(image), sites)
        for site in sites:
            norms[site].append(relative_norms(states[site][0]))
    layers = []
    for site in sites:
        first_norms = [of_image[0].item() for of_image in norms[site]]
        counts = [(of_image >= SINK_NORM).sum().item() for of_image in norms[site]]
        layer = {
            "site": site,
            "first_norm": statistics.median(first_norms),
            "sinks": statistics.fmean(counts),
        }
        layers.append(layer)
    return {"images": len(images), "layers": layers}


def relative_norms(states: "Tensor") -> "Tensor":
    """Return the norm of each token in medians of all, f[T], from states f[T, d]."""
    norms = states.float().norm(dim=-1)
    return norms / norms.median()


def sinks_of(run: "ProbeRun") -> Sinks:
    """Return what was measured of a run; `NOT_MEASURED` without."""
    return run.analysis(ANALYSIS.result) or NOT_MEASURED


def starts_with_sink(layer: LayerSinks) -> bool:
    """Return whether the first image token is a sink at a layer that was measured."""
    return layer["first_norm"] >= SINK_NORM


def layers_with_sinks(measured: Sinks) -> list[int]:
    """Return the layers whose image tokens attend to a sink among them: in most images the first one, or one each."""
    last = len(measured["layers"])
    attending = []
    for layer in measured["layers"]:
        next_layer = layer_number(layer["site"]) + 1
        has_sink = starts_with_sink(layer) or layer["sinks"] >= 1
        if has_sink and next_layer <= last:
            attending.append(next_layer)
    return attending


def meets_sink(layers: Iterable[int], measured: Sinks) -> bool:
    """Return whether a knockout of image tokens in these layers can cut off a sink."""
    return not {*layers}.isdisjoint(layers_with_sinks(measured))


def describe_sinks(mask: str, measured: Sinks, layers: Iterable[int] | None = None) -> str:
    """Return a sentence about a knockout in layers (None: all) whose columns can include a sink; "" if none can."""
    cut = layers_with_sinks(measured)
    if layers is not None:
        cut = sorted({*layers}.intersection(cut))
    if not cut:
        return ""
    entries = [layer for layer in measured["layers"] if layer_number(layer["site"]) + 1 in cut]
    norm = max(layer["first_norm"] for layer in entries)
    count = max(layer["sinks"] for layer in entries)
    where = f"layer {cut[0]}"
    if len(cut) > 1:
        where = f"{len(cut)} layers from {cut[0]} to {cut[-1]}"
    return (
        f"{mask.capitalize()}: in {where}, image tokens attend to attention sinks among them (up to {count:.3g} per "
        f"image with {SINK_NORM:g} times the median norm; the first one has up to {norm:.3g} times, in "
        f"{measured['images']} images). Where blocked tokens include a sink, an effect of such layers also shows what "
        "its absence does."
    )


ANALYSIS = Analysis(
    name="sinks",
    help="measure which image tokens are attention sinks, by layer, into RUN/sinks.json",
    question="Which image tokens are attention sinks, whatever the image shows?",
    options=SinksOptions,
    measure=measure,
    arms=("trained", "probes"),
    default=True,
)
