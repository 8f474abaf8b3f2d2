"""Effects of cut routes: changes of the right answer's log-probability and of answers, with paired intervals.

Each question is its own control. Images are resampled with all their questions, for all routes and runs alike. The
interval of a cut in all layers is its own; those of windows hold for all windows of a route together.

Shapes: Q questions, W windows, R resamplings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import simultaneous_band
from probes.analyses.knockout.rates import Cases, image_weights
from probes.evaluation.estimate import Estimate, estimate_text

CONTRAST = "object - random"
TARGETS = ("question", "last", "text", "image")
SOURCES = ("image", "object", "others", "random", CONTRAST)
ROUTES = [(source, target) for target in TARGETS for source in SOURCES]
ROUTES += [("question", "last")]

Tensors = dict[str, Tensor]  # content of routes.safetensors


def route_effects(tensors: Tensors, places: Sequence[Sequence[int]], seed: int) -> dict[str, Any]:
    """Return the effects in the content of routes.safetensors.

    Args:
        tensors: See run.py.
        places: First and last layer of each cut, all layers first.
        seed: Seed of the bootstrap.

    Returns:
        {"questions", "images", "accuracy": {"value", "ci95"}, "effects": [{"source", "target", "all", "windows",
        "changed", "changed_windows"}]}. "all" and "changed" are {"value", "ci95"}, in nats and as the share of answers
        that change; the lists have one of these with "layers" for each window. The source "object - random" is the
        difference of the two.
    """
    cases = Cases({}, tensors["image"])
    weights = image_weights(tensors["image"], seed)
    right = (tensors["none"].argmax(-1) == tensors["right"]).double()
    mean, resampled = cases.mean(right, weights)
    accuracy = Estimate(mean.item(), resampled).json(lowest=0.0, highest=1.0)
    effects = []
    for source, target in ROUTES:
        effect: dict[str, Any] = {"source": source, "target": target}
        for outcome, of_all, by_window in (
            ("right", "all", "windows"),
            ("changed", "changed", "changed_windows"),
        ):
            mean, resampled = cases.mean(change(tensors, outcome, source, target), weights)
            effect[of_all] = Estimate(mean[0].item(), resampled[:, 0]).json()
            effect[by_window] = _window_entries(mean[1:], resampled[:, 1:], places[1:])
        effects.append(effect)
    counts = {"questions": len(right), "images": cases.counts["images"]}
    return counts | {"accuracy": accuracy, "effects": effects}


def change(
    tensors: Tensors,
    outcome: str,
    source: str,
    target: str,
) -> Tensor:
    """Return the change of an outcome, "right" or "changed", when a route is cut, f[Q, 1 + W]."""
    if source == CONTRAST:
        own, other = (change(tensors, outcome, name, target) for name in CONTRAST.split(" - "))
        return own - other
    values = tensors[f"{outcome}:{source} to {target}"].double()
    if outcome == "changed":
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
    """Print the effects of cuts in all layers, and the window with the largest one."""
    accuracy = estimate_text(results["accuracy"], ".1%")
    asked = f"{results['questions']} questions about {results['images']} images"
    print(f"{asked}, answered correctly: {accuracy}")
    print("Change of the right answer's log-probability (nats), share of answers that change:")
    for effect in results["effects"]:
        route = f"{effect['source']} to {effect['target']}"
        of_all = estimate_text(effect["all"], "+.3f")
        strongest = max(effect["windows"], key=lambda window: abs(window["value"]))
        first, last = strongest["layers"]
        window = estimate_text(strongest, "+.3f")
        print(
            f"  {route:<27} {of_all}, {effect['changed']['value']:+.0%}; most in layers {first}-{last}: {window}"
        )
