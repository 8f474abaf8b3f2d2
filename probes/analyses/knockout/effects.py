"""Statistics over the cases of a knockout: mean rates with intervals, effects against controls with permutation tests.

An effect is a condition's rate minus its control's, case by case. Its interval resamples the images of the split (or
their groups). Its p-values swap the two conditions on whole images and are corrected over layers by max-T, those of the
later half of the layers over classes by Holm. The claims of a report are about contrasts instead (contrasts.py).

Shapes: C cases, L layers, R resamplings or permutations, N images of the split, U units.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import scipy.stats
import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, holm, interval, p_values
from probes.evaluation.estimate import Estimate
from probes.results.probe_run import ProbeRun
from probes.results.run_files import read_tensors

from .schema import BALANCE, CASE_KEYS, CONDITIONS, CONTROLS, SETS

SPECIFICITY = "correct - incorrect"
# of the effects that the paper claims (App. C.2)
CLAIMED_SIGN = {
    "incorrect": -1,
    "correct": +1,
    SPECIFICITY: +1,
}
# A class in fewer images, or groups of images that are swapped together, cannot reach p < 0.05: of n, 2 of the 2^n ways
# to swap are as extreme as the observed.
MIN_IMAGES = 6


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

    def swapped_mean(self, effect: Tensor, swaps: Tensor) -> Tensor:
        """Return the mean of `effect` f[C, ...] with conditions swapped on the images of `swaps` f[R, N], f[R, ...]."""
        signs = 1 - 2 * swaps.double()[:, self.images]
        return torch.tensordot(signs, effect.double(), 1) / len(effect)


def image_weights(images: Tensor, seed: int) -> Tensor:
    """Return bootstrap weights f[R, N] of the images that cases are in, of their indices long[C]."""
    return bootstrap_weights(int(images.max()) + 1, seed=seed)


def later_half(rates: Tensor) -> Tensor:
    """Return the mean over the later half of the layers, f[C], of rates f[C, L + 1]."""
    return rates[:, (rates.shape[1] - 1) // 2 + 1 :].mean(1)


def enough_units(cases: Cases, groups: Tensor | None) -> bool:
    """Return whether the cases are in `MIN_IMAGES` images, or in as many of the groups long[N]."""
    return len((cases.images if groups is None else groups[cases.images]).unique()) >= MIN_IMAGES


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
    """Return the conditions of a knockout, `CONDITIONS` first."""
    keys = dict.fromkeys(key.rpartition("/")[2] for key in tensors)
    present = [key for key in keys if ":" not in key and key not in CASE_KEYS]
    return sorted(
        present, key=lambda key: CONDITIONS.index(key) if key in CONDITIONS else len(CONDITIONS)
    )


def class_entry(
    name: str,
    tensors: dict[str, Tensor],
    seed: int,
    groups: Tensor | None = None,
) -> dict[str, Any]:
    """Return the rates of a class by condition with intervals, and the balance: an entry of "classes" in knockout.json.

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
        "balance": {},
    }
    for condition in list_conditions(tensors):
        rates = tensors[f"{name}/{condition}"]
        mean = rates.mean(0).tolist()
        resampled = weights @ rates
        entry["remaining"][condition] = mean
        entry["ci95"][condition] = [interval(m, resampled[:, i]) for i, m in enumerate(mean)]
        if f"{name}/balance:{condition}" in tensors:
            means = tensors[f"{name}/balance:{condition}"].nanmean(0).tolist()
            entry["balance"][condition] = {
                k: None if v != v else v for k, v in zip(BALANCE, means, strict=True)
            }
    return entry


def effect_entries(
    name: str,
    cases: Cases,
    weights: Tensor,
    swaps: Tensor,
) -> list[dict[str, Any]]:
    """Return the effect of each condition against its controls, and specificity, for a class or all.

    Specificity is (correct - incorrect) minus the same difference of a control. It is positive if the blocked class
    matters beyond the number of tokens, their distance and the attention that they receive.

    Takes the class's cases, `weights` f[R, N] of the bootstrap and `swaps` f[1 + R, N] of the permutations.

    Returns:
        [{"class", "condition", "control", "images", "cases", "mean": [L + 1], "ci95": [[lo, hi]], "p": [L],
        "p_corrected": [L], "later": {"value", "ci95", "p"}}]; p-values start at layer 1, "later" is the mean over the
        later half of the layers.
    """
    entries = []
    for condition, control, effect in _compare(cases.rates):
        mean, resampled = cases.mean(effect, weights)
        p, corrected = p_values(cases.swapped_mean(effect[:, 1:], swaps))
        later = later_half(effect)
        value, later_resampled = cases.mean(later, weights)
        entries.append(
            {
                "class": name,
                "condition": condition,
                "control": control,
                **cases.counts,
                "mean": mean.tolist(),
                "ci95": [interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())],
                "p": p.tolist(),
                "p_corrected": corrected.tolist(),
                "later": {
                    "value": value.item(),
                    "ci95": interval(value.item(), later_resampled),
                    "p": p_values(cases.swapped_mean(later[:, None], swaps))[0].item(),
                },
            }
        )
    return entries


def _compare(rates: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """Return (condition, control, effect f[C, L + 1]) of all comparisons."""
    controls = [control for control in CONTROLS if f"{control}_correct" in rates]
    pairs = [(condition, "none") for condition in rates if condition != "none"]
    pairs += [(name, f"{control}_{name}") for control in controls for name in SETS]
    effects = [
        (condition, control, rates[condition] - rates[control]) for condition, control in pairs
    ]

    def contrast(prefix):
        return rates[f"{prefix}correct"] - rates[f"{prefix}incorrect"]

    return effects + [
        (SPECIFICITY, control, contrast("") - contrast(f"{control}_")) for control in controls
    ]


def correct_for_classes(effects: list[dict[str, Any]], classes: Collection[str]) -> None:
    """Add "p_holm" to "later" of all effects: "p" corrected for the number of `classes`, None for other classes."""
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for effect in effects:
        effect["later"]["p_holm"] = None
        if effect["class"] in classes:
            families.setdefault((effect["condition"], effect["control"]), []).append(
                effect["later"]
            )
    for family in families.values():
        for later, p in zip(family, holm([later["p"] for later in family]), strict=True):
            later["p_holm"] = p


def mean_over_classes(effects: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return the mean of estimates over classes, or other units, with a 95% interval for classes in general.

    Classes have equal weights. The interval is Hartung and Knapp's: t quantiles of U - 1 degrees of freedom, and the
    spread of the classes as the standard error. It is never shorter than images alone would make it (the modification
    of Roever, Knapp and Friede 2015, doi 10.1186/s12874-015-0091-1); images that classes share are accounted for, since
    all classes have the same resamplings.

    Returns:
        {"value", "ci95", "units": U, "sd": over units}. "ci95" and "sd" are None for a single unit, which says nothing
        about others; "value" is None without any.
    """
    result = {
        "value": None,
        "ci95": None,
        "units": len(effects),
        "sd": None,
    }
    if not effects:
        return result
    values = torch.tensor([effect.value for effect in effects.values()], dtype=torch.float64)
    value = values.mean().item()
    if len(values) == 1:
        return result | {"value": value}
    # a resampling can lack all images of a rare class
    of_images = torch.stack([effect.resampled.double() for effect in effects.values()]).nanmean(0)
    of_draws = values.var().item() / len(values)
    variance = max(of_draws, of_images[~of_images.isnan()].var().item())
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * variance**0.5
    return result | {
        "value": value,
        "ci95": [value - half, value + half],
        "sd": values.std().item(),
    }
