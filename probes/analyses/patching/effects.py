"""Effects of patched states: means over images with intervals that hold for all layers together.

The paper makes no claim about them; they are exploratory.

Shapes: N images, L layers, R resamplings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, simultaneous_band
from probes.score.estimate import Estimate, estimate_text

GROUPS = ("patched", "others", "random", "difference")


def patching_effects(
    tensors: dict[str, Tensor],
    layers: Sequence[int],
    seed: int,
    groups: Tensor | None = None,
) -> dict[str, Any]:
    """Return the effects in the content of patching.safetensors.

    Args:
        tensors: "total" f[N] and by group f[N, L], in nats; NaN for an image without patches.
        layers: Number of each layer.
        seed: Seed of the bootstrap.
        groups: long[n], the group of each validation image, with which it is resampled; n >= N.

    Returns:
        {"images", "total": {"value", "ci95"}, GROUP: [{"layer", "value", "ci95"}]}. Intervals of a list hold for all
        its layers together. A group without patches in any image is left out.
    """
    total = tensors["total"].double()
    groups = None if groups is None else groups[: len(total)]
    weights = bootstrap_weights(len(total), seed=seed, groups=groups)
    mean, resampled = nan_mean(total[:, None], weights)
    results: dict[str, Any] = {
        "images": len(total),
        "total": Estimate(mean.item(), resampled[:, 0]).json(),
    }
    for group in GROUPS:
        values = tensors[group].double()
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
    total = estimate_text(results["total"], "+.3f")
    print(f"donor minus unpatched at {results['site']}, {results['images']} images: {total} nats")
    shown = "others" if "others" in results else "patched"
    for place, random in zip(
        results[shown],
        results.get("difference", [None] * len(results[shown])),
        strict=True,
    ):
        line = estimate_text(place, "+.3f")
        if random:
            line += f", beyond random tokens {estimate_text(random, '+.3f')}"
        print(f"  layer {place['layer']:>2}, {shown}: {line}")
