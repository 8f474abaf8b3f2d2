"""Accuracy of answers beside probes, and effects of cut routes on answers, with paired intervals.

Each question is its own control. Images are resampled with all their questions, for all routes and runs alike. The
interval of a cut in all layers is its own; those of windows hold for all windows of a route together.

Shapes: Q questions, W windows, R resamplings.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import simultaneous_band
from probes.analyses.knockout.rates import Cases, image_weights
from probes.analyses.sinks import describe_sinks, meets_sink
from probes.score.estimate import Estimate, estimate_text

CONTRAST = "object - random"
TARGETS = {  # sets of tokens of a knockout
    "question": ("question",),
    "last": ("last",),
    "text": ("question", "last", "answer"),
}
SOURCES = ("image", "object", "random", CONTRAST)

Tensors = dict[str, Tensor]  # content of routes.safetensors


def answer_statistics(tensors: Tensors, sites: Sequence[str], seed: int) -> dict[str, Any]:
    """Return how many answers are right, beside the probes at the same places.

    Args:
        tensors: See run.py.
        sites: Sites of the probes.
        seed: Seed of the bootstrap.

    Returns:
        {"questions", "images": numbers, "accuracy", "sites": [{"site", "accuracy", "difference": answer minus probe,
        "agreement": share of questions on which both say the same}]}; values with intervals are {"value", "ci95"}.
    """
    cases = Cases({}, tensors["image"])
    weights = image_weights(tensors["image"], seed)

    def entry(values: Tensor, lowest: float = 0.0) -> dict[str, Any]:
        mean, resampled = cases.mean(values.double(), weights)
        return Estimate(mean.item(), resampled).json(lowest=lowest, highest=1.0)

    answered = tensors["none"].argmax(-1)
    is_right = (answered == tensors["right"]).double()
    of_sites = []
    for site in sites:
        read = tensors[f"probe:{site}"].argmax(-1)
        probe_is_right = (read == tensors["right"]).double()
        of_sites.append(
            {
                "site": site,
                "accuracy": entry(probe_is_right),
                "difference": entry(is_right - probe_is_right, -1.0),
                "agreement": entry(answered == read),
            }
        )
    return {
        "questions": len(answered),
        "images": cases.counts["images"],
        "accuracy": entry(is_right),
        "sites": of_sites,
    }


def route_effects(
    tensors: Tensors, places: Sequence[Sequence[int]], seed: int
) -> list[dict[str, Any]]:
    """Return the effects in the content of routes.safetensors.

    Args:
        tensors: See run.py.
        places: First and last layer of each cut, all layers first.
        seed: Seed of the bootstrap.

    Returns:
        [{"source", "target", "all", "windows", "changed", "changed_windows", "right"}]. "all", "changed" and "right"
        are {"value", "ci95"} of a cut in all layers: in nats, and as the shares of answers that change and that are
        right; the lists have one of these with "layers" for each window. The source "object - random" is the
        difference of the two.
    """
    cases = Cases({}, tensors["image"])
    weights = image_weights(tensors["image"], seed)
    effects = []
    for target, source in product(TARGETS, SOURCES):
        effect: dict[str, Any] = {"source": source, "target": target}
        for outcome, of_all, by_window in (
            ("right", "all", "windows"),
            ("changed", "changed", "changed_windows"),
        ):
            mean, resampled = cases.mean(change(tensors, outcome, source, target), weights)
            effect[of_all] = Estimate(mean[0].item(), resampled[:, 0]).json()
            effect[by_window] = _window_entries(mean[1:], resampled[:, 1:], places[1:])
        mean, resampled = cases.mean(change(tensors, "correct", source, target), weights)
        effect["right"] = Estimate(mean[0].item(), resampled[:, 0]).json()
        effects.append(effect)
    return effects


def change(
    tensors: Tensors,
    outcome: str,
    source: str,
    target: str,
) -> Tensor:
    """Return an outcome when a route is cut, f[Q, 1 + W]: "right" in nats more, "changed", or "correct"."""
    if source == CONTRAST:
        own, other = (change(tensors, outcome, name, target) for name in CONTRAST.split(" - "))
        return own - other
    values = tensors[f"{outcome}:{source} to {target}"].double()
    if outcome != "right":
        return values
    none = tensors["none"].gather(1, tensors["right"][:, None]).double()
    return values - none


def claimed_routes(tensors: Tensors, seed: int) -> dict[str, Estimate]:
    """Return the number of each claim about routes from the content of routes.safetensors.

    Args:
        tensors: See run.py.
        seed: Seed of the bootstrap.
    """
    cases = Cases({}, tensors["image"])
    # drops of the probability, in all layers: more without the object's patches than without random ones
    own, other = (
        tensors[f"probability:{name} to text"][:, 0].double() for name in CONTRAST.split(" - ")
    )
    mean, resampled = cases.mean(other - own, image_weights(tensors["image"], seed))
    counts = {"images": cases.counts["images"], "questions": len(own)}
    return {"route_object": Estimate(mean.item(), resampled, {"n": counts})}


def _window_entries(
    values: Tensor, resampled: Tensor, places: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    low, high = simultaneous_band(values, resampled)
    return [
        {
            "layers": list(place),
            "value": value,
            "ci95": ci95,
        }
        for place, value, ci95 in zip(
            places, values.tolist(), torch.stack([low, high], 1).tolist(), strict=True
        )
    ]


def print_routes(results: dict[str, Any]) -> None:
    """Print how many answers are right, the effects of cuts in all layers, and the window with the largest one."""
    accuracy = estimate_text(results["accuracy"], ".1%")
    asked = f"{results['questions']} questions about {results['images']} images"
    by_chance = f"{1 / len(results['classes']):.1%} by a random class"
    print(f"{asked}, answered correctly: {accuracy} ({by_chance})")
    for entry in results["sites"]:
        accuracy = estimate_text(entry["accuracy"], ".1%")
        agreement = entry["agreement"]["value"]
        print(f"  probe at {entry['site']:<11} {accuracy}, agrees in {agreement:.1%}")
    print(
        "Change of the right answer's log-probability (nats), shares that change and that are right:"
    )
    for effect in results["effects"]:
        route = f"{effect['source']} to {effect['target']}"
        of_all = estimate_text(effect["all"], "+.3f")
        strongest = max(effect["windows"], key=lambda window: abs(window["value"]))
        first, last = strongest["layers"]
        window = estimate_text(strongest, "+.3f")
        if can_cut_sink(strongest["layers"], results["sinks"]):
            window += ", can cut a sink"
        shares = f"{effect['changed']['value']:+.0%}, {effect['right']['value']:.0%}"
        print(f"  {route:<27} {of_all}, {shares}; most in layers {first}-{last}: {window}")
    if sentence := describe_sinks(every_layer(results["sinks"]), results["sinks"]):
        print(f"{sentence}.")


def every_layer(sinks: Mapping[str, Any]) -> range:
    """Return the numbers of the layers in which sinks were measured."""
    return range(1, len(sinks["layers"]) + 1)


def can_cut_sink(layers: Sequence[int], sinks: Mapping[str, Any]) -> bool:
    """Return whether image tokens can be attention sinks in some layers of a cut.

    Args:
        layers: First and last layer of the cut.
        sinks: routes.json["sinks"].
    """
    return meets_sink(range(layers[0], layers[1] + 1), sinks)
