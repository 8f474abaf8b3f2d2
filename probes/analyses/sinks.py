"""What analyses say of image tokens that are attention sinks; measured_sinks.py measures them. Imports nothing heavy.

The states that a layer writes are the keys of the next one: a knockout of layer 5 meets the sinks of layer_04. What is
cut off from a sink attends elsewhere by force, which is no route of information.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from probes.models.sites import layer_number

# A state is a sink's from this multiple of the median norm. In SmolLM2-135M sinks have 159 times the median, the
# largest of other tokens 3 to 5 times.
SINK_NORM = 10.0


def starts_with_sink(layer: Mapping[str, Any]) -> bool:
    """Return whether the first image token is a sink at a layer that was measured."""
    return layer["first_norm"] >= SINK_NORM


def layers_with_sinks(measured: Mapping[str, Any]) -> list[int]:
    """Return the layers whose image tokens attend to a sink among them: in most images the first one, or one each.

    Args:
        measured: What `measure_sinks` returns.
    """
    last = len(measured["layers"])
    found = [
        layer_number(layer["site"]) + 1
        for layer in measured["layers"]
        if starts_with_sink(layer) or layer["sinks"] >= 1
    ]
    return [number for number in found if number <= last]


def meets_sink(layers: Iterable[int], measured: Mapping[str, Any]) -> bool:
    """Return whether a knockout of image tokens in these layers can cut off a sink."""
    return not {*layers}.isdisjoint(layers_with_sinks(measured))


def describe_sinks(layers: Iterable[int], measured: Mapping[str, Any]) -> str:
    """Return a sentence about a knockout in layers whose columns can include a sink; "" if none can."""
    cut = sorted({*layers}.intersection(layers_with_sinks(measured)))
    if not cut:
        return ""
    entries = [layer for layer in measured["layers"] if layer_number(layer["site"]) + 1 in cut]
    norm = max(layer["first_norm"] for layer in entries)
    count = max(layer["sinks"] for layer in entries)
    where = f"layer {cut[0]}" if len(cut) == 1 else f"{len(cut)} layers from {cut[0]} to {cut[-1]}"
    return (
        f"In {where}, image tokens attend to attention sinks among them (up to {count:.3g} per image with "
        f"{SINK_NORM:g} times the median norm; the first one has up to {norm:.3g} times, in {measured['images']} "
        "images). Where blocked tokens include a sink, an effect of such layers also shows what its absence does"
    )
