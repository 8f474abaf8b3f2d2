"""Effects of patched states: means over images with intervals that hold for all layers of a set together.

The paper makes no claim about them; they are exploratory.

Shapes: N images, L layers, R resamplings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, simultaneous_band
from probes.evaluation.estimate import Estimate, estimate_text

GROUPS = ("patched", "others", "random", "difference")


def patching_effects(
    tensors: dict[str, Tensor],
    layers: Sequence[int],
    seed: int,
    groups: Tensor | None = None,
) -> dict[str, Any]:
    """Return the effects in the content of patching.safetensors.

    Args:
        tensors: "EXPERIMENT/total" f[N] and "EXPERIMENT/SET/GROUP" f[N, L], in nats; NaN for an image without patches.
        layers: Number of each layer.
        seed: Seed of the bootstrap.
        groups: long[n], the group of each validation image, with which it is resampled; n >= N. Pairs have no groups.

    Returns:
        {"experiments": [{"experiment", "images", "total": {"value", "ci95"}, "sets": [{"set", GROUP: [{"layer",
        "value", "ci95"}]}]}]}. Intervals of a list hold for all its layers together. A group without patches in any
        image (such as "others" of the set "all") is left out.
    """
    experiments = []
    for name in (key.removesuffix("/total") for key in tensors if key.endswith("/total")):
        total = tensors[f"{name}/total"].double()
        groups_of = None if groups is None or name == "pairs" else groups[: len(total)]
        weights = bootstrap_weights(len(total), seed=seed, groups=groups_of)
        sets = [
            {"set": s} | _groups(tensors, f"{name}/{s}", layers, weights)
            for s in set_names(tensors, name)
        ]
        mean, resampled = nan_mean(total[:, None], weights)
        experiments.append(
            {
                "experiment": name,
                "images": len(total),
                "total": Estimate(mean.item(), resampled[:, 0]).json(),
                "sets": sets,
            }
        )
    return {"experiments": experiments}


def set_names(tensors: dict[str, Tensor], experiment: str) -> list[str]:
    """Return the sets of an experiment, from the keys "EXPERIMENT/SET/GROUP"."""
    names: dict[str, None] = {}
    for key in tensors:
        parts = key.split("/")
        if parts[0] == experiment and len(parts) == 3:
            names[parts[1]] = None
    return list(names)


def _groups(
    tensors: dict[str, Tensor],
    key: str,
    layers: Sequence[int],
    weights: Tensor,
) -> dict[str, Any]:
    results = {}
    for group in GROUPS:
        values = tensors[f"{key}/{group}"].double()
        if values.isnan().all():
            continue
        mean, resampled = nan_mean(values, weights)
        bounds = zip(*simultaneous_band(mean, resampled), strict=True)
        results[group] = [
            {
                "layer": layer,
                "value": value,
                "ci95": [low.item(), high.item()],
            }
            for layer, value, (low, high) in zip(layers, mean.tolist(), bounds, strict=True)
        ]
    return results


def nan_mean(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of f[N, L] over images without NaN, f[L], and those under weights f[R, N], f[R, L]."""
    valid = ~values.isnan()
    filled = torch.where(valid, values, 0)
    mean = filled.sum(0) / valid.sum(0)
    weights = weights.double()
    resampled = (weights @ filled) / (weights @ valid.double())
    return mean, resampled


def print_effects(results: dict[str, Any]) -> None:
    """Print the effects at other tokens than the patched ones, by layer."""
    for experiment in results["experiments"]:
        total = estimate_text(experiment["total"], "+.3f")
        print(
            f"{experiment['experiment']}: donor minus unpatched at {results['site']}, {experiment['images']} images: "
            f"{total} nats"
        )
        for entry in experiment["sets"]:
            shown = "others" if "others" in entry else "patched"
            for place, random in zip(
                entry[shown], entry.get("difference", [None] * len(entry[shown])), strict=True
            ):
                line = estimate_text(place, "+.3f")
                if random:
                    line += f", beyond random tokens {estimate_text(random, '+.3f')}"
                print(f"  {entry['set']:<10} layer {place['layer']:>2}, {shown}: {line}")
