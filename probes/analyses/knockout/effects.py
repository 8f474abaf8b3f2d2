"""What a knockout's cases say: mean rates with intervals, effects against controls with permutation tests.

An effect is a condition's rate minus its control's, case by case. Its interval resamples the images of the split (or
their groups); its p-values swap the two conditions' names on whole images, and are corrected over layers by max-T.

Shapes: C cases, L layers, R resamplings or permutations, N images of the split.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import bootstrap_weights, interval, p_values
from probes.results.probe_run import ProbeRun, read_tensors

from .attention import GROUPS
from .conditions import BALANCE, CONDITIONS, CONTROLS, SETS

FACTS = ("image", "patches", "anchors", "correct_class", "attention", "uniform")
SPECIFICITY = "correct - incorrect"


class Cases(NamedTuple):
    """Cases of a finished knockout.

    Args:
        rates: n_c(l) / n_c(0) by condition, f[C, L + 1].
        images: long[C], indices in the split; an image can hold cases of several classes.
    """

    rates: dict[str, Tensor]
    images: Tensor

    def mean(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over cases of `values` f[C, ...], and under `weights` f[R, N] of the split's images, f[R, ...]."""
        weights = weights.double()[:, self.images]
        values = values.double()
        return values.mean(0), torch.tensordot(weights, values, 1) / weights.sum(1).view(-1, *[1] * (values.ndim - 1))

    def swapped(self, effect: Tensor, swaps: Tensor) -> Tensor:
        """Mean of `effect` f[C, ...] once the two conditions have changed names on the images of `swaps` f[R, N],
        f[R, ...]; cases of one image go together.
        """
        signs = 1 - 2 * swaps.double()[:, self.images]
        return torch.tensordot(signs, effect.double(), 1) / len(effect)


def later_half(rates: Tensor) -> Tensor:
    """The mean over the later half of the layers, f[C], of rates f[C, L + 1]: where the paper's effects are read."""
    return rates[:, (rates.shape[1] - 1) // 2 + 1 :].mean(1)


def read_cases(run: ProbeRun, min_patches: int, classes: list[str] | None = None) -> Cases | None:
    """The cases of a run's knockout with at least `min_patches` patches wrong at the adapter; None if there is none."""
    path = run.path / "knockout.safetensors"
    return select_cases(read_tensors(path) if path.is_file() else {}, min_patches, classes)


def select_cases(tensors: dict[str, Tensor], min_patches: int = 1, classes: list[str] | None = None) -> Cases | None:
    """The same from what knockout.safetensors holds."""
    kept = joined(tensors, "patches", classes) >= min_patches
    if not kept.any():
        return None
    of = lambda what: joined(tensors, what, classes)[kept]
    return Cases({condition: of(condition) for condition in conditions_in(tensors)}, of("image"))


def joined(tensors: dict[str, Tensor], what: str, classes: list[str] | None) -> Tensor:
    """One fact or condition of the cases of some classes, or of all, one class after the other; empty without cases."""
    names = [key.removesuffix(f"/{what}") for key in tensors if key.endswith(f"/{what}")]
    values = [tensors[f"{name}/{what}"] for name in names if classes is None or name in classes]
    return torch.cat(values) if values else torch.zeros(0)


def conditions_in(tensors: dict[str, Tensor]) -> list[str]:
    """The conditions of a knockout, those of every knockout first."""
    whats = dict.fromkeys(key.rpartition("/")[2] for key in tensors)
    found = [what for what in whats if what not in FACTS and not what.startswith("balance:")]
    return [what for what in CONDITIONS if what in found] + [what for what in found if what not in CONDITIONS]


def class_entry(name: str, tensors: dict[str, Tensor], seed: int, groups: Tensor | None = None) -> dict:
    """Mean remaining rate by condition and layer, with intervals over images (or their groups, long[N]), and what was
    blocked; empty where no image has a case.
    """
    if f"{name}/image" not in tensors:
        return {"class": name, "images": 0, "remaining": {}, "ci95": {}}
    images = len(tensors[f"{name}/image"])
    groups = None if groups is None else groups[tensors[f"{name}/image"]]
    weights = bootstrap_weights(images, seed=seed, groups=groups)
    weights /= weights.sum(1, keepdim=True)
    entry: dict[str, Any] = {"class": name, "images": images, "remaining": {}, "ci95": {}, "balance": {}}
    for condition in conditions_in(tensors):
        rates = tensors[f"{name}/{condition}"]
        mean, resampled = rates.mean(0).tolist(), weights @ rates
        entry["remaining"][condition] = mean
        entry["ci95"][condition] = [interval(m, resampled[:, i]) for i, m in enumerate(mean)]
        if f"{name}/balance:{condition}" in tensors:
            means = tensors[f"{name}/balance:{condition}"].nanmean(0).tolist()
            entry["balance"][condition] = {k: None if v != v else v for k, v in zip(BALANCE, means, strict=True)}
    return entry


def effect_entries(name: str, cases: Cases, weights: Tensor, swaps: Tensor) -> list[dict]:
    """Each condition against what it is to be compared with, and specificity against each control, for a class or all.

    Specificity is (correct - incorrect) less the same of the control's: it is positive if which class is blocked
    matters beyond how many tokens, how near and how much regarded ones.

    Args:
        name: Of the class.
        cases: Its cases.
        weights: f[R, N] of the bootstrap.
        swaps: f[1 + R, N] of the permutations.

    Returns:
        [{"class", "condition", "control", "mean": [L + 1], "ci95": [[lo, hi]], "p": [L], "p_corrected": [L], "later":
        {"value", "ci95", "p"}}]; p-values from layer 1 on, "later" over the later half of the layers.
    """
    entries = []
    for condition, control, effect in _pairs(cases.rates):
        mean, resampled = cases.mean(effect, weights)
        by_layer, corrected = p_values(cases.swapped(effect[:, 1:], swaps))
        later = later_half(effect)
        value, drawn = cases.mean(later, weights)
        entries.append(
            {
                "class": name,
                "condition": condition,
                "control": control,
                "mean": mean.tolist(),
                "ci95": [interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())],
                "p": by_layer.tolist(),
                "p_corrected": corrected.tolist(),
                "later": {
                    "value": value.item(),
                    "ci95": interval(value.item(), drawn),
                    "p": p_values(cases.swapped(later[:, None], swaps))[0].item(),
                },
            }
        )
    return entries


def _pairs(rates: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """(condition, control, effect f[C, L + 1]) of all that are compared."""
    controls = [control for control in CONTROLS if f"{control}_correct" in rates]
    pairs = [(condition, "none") for condition in rates if condition != "none"]
    pairs += [(name, f"{control}_{name}") for control in controls for name in SETS]
    pairs += [(f"only_{name}", f"only_random_{name}") for name in SETS if f"only_{name}" in rates]
    found = [(condition, control, rates[condition] - rates[control]) for condition, control in pairs]
    contrast = lambda of: rates[f"{of}correct"] - rates[f"{of}incorrect"]
    return found + [(SPECIFICITY, control, contrast("") - contrast(f"{control}_")) for control in controls]


def attention_entry(name: str, tensors: dict[str, Tensor], classes: list[str] | None) -> dict:
    """Mean attention of mistaken patches by group and layer (1..L), and what it would be did they look alike at all
    that they see.
    """
    shares, uniform = (joined(tensors, what, classes).mean(0) for what in ("attention", "uniform"))
    return {
        "class": name,
        "share": dict(zip(GROUPS, shares.T.tolist(), strict=True)),
        "uniform": dict(zip(GROUPS, uniform.tolist(), strict=True)),
    }
