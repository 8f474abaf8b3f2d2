"""Rates of wrong patches over the cases of a knockout, by class and condition, as knockout.safetensors has them.

Shapes: C cases, L layers, R resamplings, N images of the split.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, interval
from probes.runs.probe_run import ProbeRun
from probes.runs.run_files import read_tensors

from .schema import CONDITIONS


class Cases(NamedTuple):
    """One outcome of the cases of a finished knockout, by default the rate."""

    rates: dict[str, Tensor]  # the outcome by condition, f[C, L + 1], see cases.py
    images: Tensor  # long[C], indices in the split; an image can have cases of several classes

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases, and of images that they are in."""
        return {"images": len(self.images.unique()), "cases": len(self.images)}

    def mean(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over cases of `values` f[C, ...], and those under image weights f[R, N], f[R, ...]."""
        weights = weights.double()[:, self.images]
        values = values.double()
        return values.mean(0), torch.tensordot(weights, values, 1) / weights.sum(1).view(
            -1, *[1] * (values.ndim - 1)
        )


def image_weights(images: Tensor, seed: int) -> Tensor:
    """Return bootstrap weights f[R, N] of the images that cases are in, of their indices long[C]."""
    return bootstrap_weights(int(images.max()) + 1, seed=seed)


def later_half(rates: Tensor) -> Tensor:
    """Return the mean over the later half of the layers, f[C], of rates f[C, L + 1]."""
    return rates[:, (rates.shape[1] - 1) // 2 + 1 :].mean(1)


def read_knockout(run: ProbeRun) -> dict[str, Tensor]:
    """Return the content of a run's knockout.safetensors; {} without it."""
    path = run.path / "knockout.safetensors"
    return read_tensors(path) if path.is_file() else {}


def select_cases(tensors: dict[str, Tensor], classes: list[str] | None = None) -> Cases | None:
    """Return the cases of some classes (None: all) with their rates; None without any."""
    images = concat_classes(tensors, "image", classes)
    rates = {name: concat_classes(tensors, name, classes) for name in list_conditions(tensors)}
    return Cases(rates, images) if len(images) else None


def outcome_key(outcome: str, condition: str) -> str:
    """Return the key of a condition's outcome in knockout.safetensors; the paper's rate has the condition's name."""
    return condition if outcome == "rate" else f"{outcome}:{condition}"


def blocked_classes(tensors: dict[str, Tensor]) -> list[str]:
    """Return the classes of "class/key" in alphabetical order; in that of a file, "A/B" stands between keys of "A"."""
    return sorted({name.rpartition("/")[0] for name in tensors})


def concat_classes(tensors: dict[str, Tensor], key: str, classes: list[str] | None) -> Tensor:
    """Concatenate "class/key" over some classes (None: all); empty without cases."""
    values = [
        tensors[f"{name}/{key}"]
        for name in blocked_classes(tensors)
        if f"{name}/{key}" in tensors and (classes is None or name in classes)
    ]
    return torch.cat(values) if values else torch.zeros(0)


def list_conditions(tensors: dict[str, Tensor]) -> list[str]:
    """Return the conditions of a knockout."""
    present = {key.rpartition("/")[2] for key in tensors}
    return [name for name in CONDITIONS if name in present]


def class_entry(
    name: str,
    tensors: dict[str, Tensor],
    seed: int,
    groups: Tensor | None = None,
) -> dict[str, Any]:
    """Return the rates of a class by condition with intervals, an entry of "classes" in knockout.json.

    Takes the content of knockout.safetensors, the bootstrap's seed, and long[N], groups of images to resample together.
    """
    if f"{name}/image" not in tensors:
        return {
            "class": name,
            "images": 0,
            "remaining": {},
            "ci95": {},
        }
    images = len(tensors[f"{name}/image"])
    if groups is not None:
        groups = groups[tensors[f"{name}/image"]]
    weights = bootstrap_weights(images, seed=seed, groups=groups)
    weights /= weights.sum(1, keepdim=True)
    entry: dict[str, Any] = {
        "class": name,
        "images": images,
        "remaining": {},
        "ci95": {},
    }
    for condition in list_conditions(tensors):
        rates = tensors[f"{name}/{condition}"]
        mean = rates.mean(0).tolist()
        resampled = weights @ rates
        entry["remaining"][condition] = mean
        entry["ci95"][condition] = [interval(m, resampled[:, i]) for i, m in enumerate(mean)]
    return entry
