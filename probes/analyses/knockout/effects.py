"""Statistics over the cases of a knockout: mean rates with intervals, effects against controls with permutation tests.

An effect is a condition's rate minus its control's, case by case. Its interval resamples the images of the split (or
their groups). Its p-values swap the two conditions on whole images and are corrected over layers by max-T.

Shapes: C cases, L layers, R resamplings or permutations, N images of the split.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, interval, p_values
from probes.results.probe_run import ProbeRun
from probes.results.run_files import read_tensors

from .schema import BALANCE, CASE_KEYS, CONDITIONS, CONTROLS, GROUPS, SETS

SPECIFICITY = "correct - incorrect"


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
        return values.mean(0), torch.tensordot(weights, values, 1) / weights.sum(1).view(-1, *[1] * (values.ndim - 1))

    def swapped_mean(self, effect: Tensor, swaps: Tensor) -> Tensor:
        """Return the mean of `effect` f[C, ...] with conditions swapped on the images of `swaps` f[R, N], f[R, ...]."""
        signs = 1 - 2 * swaps.double()[:, self.images]
        return torch.tensordot(signs, effect.double(), 1) / len(effect)


def later_half(rates: Tensor) -> Tensor:
    """Return the mean over the later half of the layers, f[C], of rates f[C, L + 1]."""
    return rates[:, (rates.shape[1] - 1) // 2 + 1 :].mean(1)


def read_cases(
    run: ProbeRun, min_patches: int, classes: list[str] | None = None, folder: Path | None = None
) -> Cases | None:
    """Return the cases in knockout.safetensors of a run (or of `folder`), see :func:`select_cases`; None without it."""
    path = (folder or run.path) / "knockout.safetensors"
    return select_cases(read_tensors(path) if path.is_file() else {}, min_patches, classes)


def select_cases(
    tensors: dict[str, Tensor], min_patches: int = 1, classes: list[str] | None = None, outcome: str = "rate"
) -> Cases | None:
    """Return the cases of some classes (None: all) with n_c(0) of at least `min_patches`.

    None if there are none, or if the file is older than the outcome.
    """
    enough, conditions = concat_classes(tensors, "patches", classes) >= min_patches, list_conditions(tensors, outcome)
    if not enough.any() or not conditions:
        return None
    select = lambda key: concat_classes(tensors, key, classes)[enough]
    return Cases({name: select(outcome_key(outcome, name)) for name in conditions}, select("image"))


def outcome_key(outcome: str, condition: str) -> str:
    """Return the key of a condition's outcome in knockout.safetensors; the paper's rate has the condition's name."""
    return condition if outcome == "rate" else f"{outcome}:{condition}"


def concat_classes(tensors: dict[str, Tensor], key: str, classes: list[str] | None) -> Tensor:
    """Concatenate "class/key" over some classes (None: all); empty without cases."""
    names = [name.removesuffix(f"/{key}") for name in tensors if name.endswith(f"/{key}")]
    values = [tensors[f"{name}/{key}"] for name in names if classes is None or name in classes]
    return torch.cat(values) if values else torch.zeros(0)


def list_conditions(tensors: dict[str, Tensor], outcome: str = "rate") -> list[str]:
    """Return the conditions of a knockout that have this outcome, `CONDITIONS` first."""
    prefix, others = outcome_key(outcome, ""), (*CASE_KEYS, "attention", "uniform")
    keys = dict.fromkeys(key.rpartition("/")[2] for key in tensors)
    conditions = [key.removeprefix(prefix) for key in keys if key.startswith(prefix) and key not in others]
    present = [condition for condition in conditions if ":" not in condition]
    return sorted(present, key=lambda key: CONDITIONS.index(key) if key in CONDITIONS else len(CONDITIONS))


def class_entry(name: str, tensors: dict[str, Tensor], seed: int, groups: Tensor | None = None) -> dict[str, Any]:
    """Return the rates of a class by condition with intervals, and the balance: an entry of "classes" in knockout.json.

    Takes the content of knockout.safetensors, the bootstrap's seed, and long[N], groups of images to resample together.
    """
    if f"{name}/image" not in tensors:
        return {"class": name, "images": 0, "remaining": {}, "ci95": {}}
    images = len(tensors[f"{name}/image"])
    groups = None if groups is None else groups[tensors[f"{name}/image"]]
    weights = bootstrap_weights(images, seed=seed, groups=groups)
    weights /= weights.sum(1, keepdim=True)
    entry: dict[str, Any] = {"class": name, "images": images, "remaining": {}, "ci95": {}, "balance": {}}
    for condition in list_conditions(tensors):
        rates = tensors[f"{name}/{condition}"]
        mean, resampled = rates.mean(0).tolist(), weights @ rates
        entry["remaining"][condition] = mean
        entry["ci95"][condition] = [interval(m, resampled[:, i]) for i, m in enumerate(mean)]
        if f"{name}/balance:{condition}" in tensors:
            means = tensors[f"{name}/balance:{condition}"].nanmean(0).tolist()
            entry["balance"][condition] = {k: None if v != v else v for k, v in zip(BALANCE, means, strict=True)}
    return entry


def effect_entries(name: str, cases: Cases, weights: Tensor, swaps: Tensor) -> list[dict[str, Any]]:
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
    pairs += [(f"only_{name}", f"only_random_{name}") for name in SETS if f"only_{name}" in rates]
    effects = [(condition, control, rates[condition] - rates[control]) for condition, control in pairs]
    contrast = lambda prefix: rates[f"{prefix}correct"] - rates[f"{prefix}incorrect"]
    return effects + [(SPECIFICITY, control, contrast("") - contrast(f"{control}_")) for control in controls]


def attention_entry(name: str, tensors: dict[str, Tensor], classes: list[str] | None) -> dict[str, Any]:
    """Return the mean attention of mistaken patches by group and layer 1..L, and the uniform share of each group."""
    share, uniform = (concat_classes(tensors, key, classes).mean(0) for key in ("attention", "uniform"))
    return {
        "class": name,
        "share": dict(zip(GROUPS, share.T.tolist(), strict=True)),
        "uniform": dict(zip(GROUPS, uniform.tolist(), strict=True)),
    }
