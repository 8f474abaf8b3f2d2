"""Inference over the classes of a knockout: which classes show the paper's effects, and do classes in general?

The paper claims its effects for each class (App. C.2). Effects of different classes can be large and of opposite sign.
The claims of a report are about all cases of the classes together (`contrasts.py`); here a class is the unit:

    per class      mean over its cases; interval over images; two-sided p from swapping the two conditions on whole
                   images (or groups), adjusted over classes by Holm
    over classes   every class has the same weight; classes are a sample of those that one could have taken, hence a t
                   interval over them, see :func:`mean_over_classes`
    over pairs     two classes mostly mistaken for each other are one unit: their effects depend on each other, and a
                   shift of the probe's criterion between them cancels in their mean

The cases are those of the paper's text: n_c(0) >= 1, or the run's `--min-patches` if larger. Effects are means over the
later half of the layers; for their signs see `EFFECTS`.

Shapes: C cases, E effects, L layers, R resamplings, N images, U units.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from torch import Tensor

from llava_bidir.common.atomic_io import read_json
from llava_bidir.common.bootstrap import Estimate, holm, interval, p_values, random_swaps, simultaneous_band
from probes.results.probe_run import ProbeRun
from probes.results.run_files import read_tensors

from .effects import Cases, later_half, select_cases
from .schema import LEAN, OUTCOMES, SETS

# effect -> sign that the paper claims for the share of patches left wrong; "_matched" is added against matched tokens
EFFECTS = {"knockout_incorrect": -1, "knockout_correct": +1, "knockout_specificity": +1}
# A class in fewer images, or groups of images that are swapped together, cannot reach p < 0.05: of n, 2 of the 2^n ways
# to swap are as extreme as the observed.
MIN_IMAGES = 6


def claimed_sign(effect: str, outcome: str) -> int:
    """Return the sign that the paper claims for an effect on an outcome; log-odds fall where more patches are wrong."""
    return EFFECTS[effect.removesuffix("_matched")] * (-1 if outcome == "log_odds" else 1)


def judge_effect(sign: int, value: float, significant: bool) -> str:
    """Return the verdict about an effect of claimed `sign`: "holds", "reversed" or "does not hold"."""
    if not significant:
        return "does not hold"
    return "holds" if sign * value > 0 else "reversed"


def class_effects(
    run: ProbeRun, min_patches: int = 1, outcome: str = "rate", folder: Path | None = None
) -> dict[str, dict[str, Estimate]]:
    """Return the effects of each class, {effect: {class: (value, resampled f[R])}}; empty without a knockout.

    Classes in fewer than `MIN_IMAGES` images are left out. Runs on the same images are resampled alike, so that their
    estimates can be subtracted class by class.

    Args:
        run: A finished probe run.
        min_patches: Smallest n_c(0) of a case.
        outcome: One of `OUTCOMES`; without it in the file, the result is empty.
        folder: Folder of knockout.safetensors, by default the run's.
    """
    effects: dict[str, dict[str, Estimate]] = {}
    for name, cases in _cases_by_class(run, read_knockout(run, folder), min_patches, outcome).items():
        names, values = later_effects(cases)
        mean, resampled = cases.mean(values, run.weights)
        for i, effect in enumerate(names):
            effects.setdefault(effect, {})[name] = mean[i].item(), resampled[:, i]
    return effects


def mean_over_classes(effects: Mapping[str, Estimate], units: Mapping[str, Hashable] | None = None) -> dict[str, Any]:
    """Return the mean over classes with a 95% interval for classes in general.

    Units have equal weights. The interval is Hartung and Knapp's: t quantiles of U - 1 degrees of freedom, and the
    spread of the units as the standard error. It is never shorter than images alone would make it (the modification of
    Roever, Knapp and Friede 2015, doi 10.1186/s12874-015-0091-1); images that classes share are accounted for, since
    all classes have the same resamplings.

    Args:
        effects: Estimates by class.
        units: Unit of each class, whose classes are averaged first, such as :func:`look_alikes`; by default each class
            is one.

    Returns:
        {"value", "ci95", "classes": number of classes, "units": U, "sd": over units}. "ci95" and "sd" are None for a
        single unit, which says nothing about others; "value" is None without any.
    """
    members: dict[Hashable, list[Estimate]] = {}
    for name, estimate in effects.items():
        members.setdefault((units or {}).get(name, name), []).append(estimate)
    result = {"value": None, "ci95": None, "classes": len(effects), "units": len(members), "sd": None}
    if not members:
        return result
    values = torch.tensor([[sum(v for v, _ in unit) / len(unit)] for unit in members.values()], dtype=torch.float64)
    value = values.mean().item()
    if len(members) == 1:
        return result | {"value": value}
    resampled = torch.stack([torch.stack([r.double() for _, r in unit]).mean(0) for unit in members.values()])
    of_images = resampled.nanmean(0)  # a resampling can lack all images of a rare class
    variance = max(values.var().item() / len(values), of_images[~of_images.isnan()].var().item())
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * variance**0.5
    return result | {"value": value, "ci95": [value - half, value + half], "sd": values.std().item()}


def look_alikes(run: ProbeRun, min_patches: int = 1, folder: Path | None = None) -> dict[str, tuple[str, str]]:
    """Return the unit of each class: the class and the one that its mistaken patches mostly are, in the run's order.

    Two classes that are mostly mistaken for each other have the same unit.
    """
    names, tensors, units = run.metrics["classes"], read_knockout(run, folder), {}
    for name in _cases_by_class(run, tensors, min_patches):
        enough = tensors[f"{name}/patches"] >= min_patches
        partner = names[tensors[f"{name}/correct_class"][enough].bincount().argmax()]
        units[name] = tuple(sorted((name, partner), key=names.index))
    return units


def criterion_shifts(run: ProbeRun, min_patches: int = 1, folder: Path | None = None) -> list[dict[str, Any]] | None:
    """Return for each pair of look-alikes a, b whether hiding either one moves the read-out the same way.

    The read-out is "lean" (cases.py): on the patches of class a or b that the adapter calls a or b, the share called a
    minus the share called b. Its move is the lean with one class hidden minus that with nothing hidden. Anchors pull
    towards their own class, so hiding a and hiding b move the read-out in opposite directions. If both move it in the
    same direction, the probe's criterion has shifted under the cut mask, whichever tokens are hidden.

    This reads the stored lean of the cases in which b is called a and, with the opposite sign, of the mirror cases in
    which a is called b. Cases without tokens of the correct class have nothing to hide and do not count.

    Returns:
        [{"classes": [a, b], "images", "hide": {a: {"value", "ci95"}, b: {"value", "ci95"}}, "shift", "towards"}]. The
        intervals cover all moves of all pairs together (max-t). "shift" is true if both intervals of a pair lie on the
        same side of zero; "towards" is then the class that gains. None if no lean was stored.
    """
    tensors = read_knockout(run, folder)
    if not any(key.rpartition("/")[2].startswith(f"{LEAN}:") for key in tensors):
        return None
    pairs, moves, shifts = sorted(set(look_alikes(run, min_patches, folder).values())), [], []
    for a, b in pairs:
        images, values = _lean_moves(run, tensors, (a, b), min_patches)
        if len(images.unique()) >= MIN_IMAGES:
            shifts.append({"classes": [a, b], "images": len(images.unique())})
            moves.append(Cases({}, images).mean(values, run.weights))
    if not moves:
        return []
    value, resampled = torch.cat([mean for mean, _ in moves]), torch.cat([drawn for _, drawn in moves], 1)
    low, high = simultaneous_band(value, resampled)
    bounds = torch.stack([value, low, high], 1).view(-1, 2, 3).tolist()
    return [shift | _judge_shift(shift["classes"], hidden) for shift, hidden in zip(shifts, bounds, strict=True)]


def _lean_moves(
    run: ProbeRun, tensors: dict[str, Tensor], pair: tuple[str, str], min_patches: int
) -> tuple[Tensor, Tensor]:
    """Return images long[C] and moves of the lean towards the first class, f[C, 2], hiding the first and the second."""
    images, moves = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, 2)]
    for wrong, correct, sign in ((*pair, 1), (*pair[::-1], -1)):
        if f"{wrong}/{LEAN}:none" not in tensors:
            continue
        of_pair = tensors[f"{wrong}/correct_class"] == run.metrics["classes"].index(correct)
        chosen = of_pair & (tensors[f"{wrong}/patches"] >= min_patches) & (tensors[f"{wrong}/anchors"] > 0)
        lean = {name: later_half(tensors[f"{wrong}/{LEAN}:{name}"][chosen]) for name in ("none", *SETS)}
        hidden = SETS[::sign]  # "incorrect" hides the wrong class of the case
        images.append(tensors[f"{wrong}/image"][chosen])
        moves.append(sign * torch.stack([lean[name] - lean["none"] for name in hidden], 1))
    return torch.cat(images), torch.cat(moves)


def _judge_shift(classes: list[str], hidden: list[list[float]]) -> dict[str, Any]:
    up, down = (all(sign * bound > 0 for _, *ci95 in hidden for bound in ci95) for sign in (1, -1))
    hide = {name: {"value": value, "ci95": ci95} for name, (value, *ci95) in zip(classes, hidden, strict=True)}
    return {"hide": hide, "shift": up or down, "towards": classes[0] if up else classes[1] if down else None}


def knockout_inference(run: ProbeRun, folder: Path | None = None) -> dict[str, Any]:
    """Return the inference over classes for results.json; empty without a knockout.

    Returns:
        {"min_patches", "min_images": `MIN_IMAGES`, "too_few_images": classes not tested, "look_alikes": [[a, b]],
        "outcomes": {outcome: {"classes": rows of :func:`class_tests`, "mean" and "mean_over_pairs": {effect:
        :func:`mean_over_classes` and "verdict"}}},
        "criterion_shifts": see :func:`criterion_shifts`}. Outcomes that an older file lacks are missing.
    """
    tensors = read_knockout(run, folder)
    if not tensors:
        return {}
    min_patches = min_patches_of(run, folder)
    units, outcomes = look_alikes(run, min_patches, folder), {}
    for outcome in OUTCOMES:
        if effects := class_effects(run, min_patches, outcome, folder):
            outcomes[outcome] = {
                "classes": class_tests(run, min_patches, outcome, folder),
                "mean": {name: _judged_mean(name, outcome, effects[name]) for name in effects},
                "mean_over_pairs": {name: _judged_mean(name, outcome, effects[name], units) for name in effects},
            }
    with_cases = [name for name in run.metrics["classes"] if f"{name}/patches" in tensors]
    tested = {name for name, x in _cases_by_class(run, tensors, min_patches).items() if _enough_units(run, x)}
    return {
        "min_patches": min_patches,
        "min_images": MIN_IMAGES,
        "too_few_images": [name for name in with_cases if name not in tested],
        "look_alikes": [list(pair) for pair, _ in Counter(units.values()).most_common()],
        "outcomes": outcomes,
        "criterion_shifts": criterion_shifts(run, min_patches, folder),
    }


def min_patches_of(run: ProbeRun, folder: Path | None = None) -> int:
    """Return the smallest n_c(0) of the cases that were run: 1, the paper's, unless `--min-patches` was larger."""
    results = read_json(folder / "knockout.json") if folder else run.analysis("knockout.json")
    return results["min_patches"] if results else 1


def class_tests(run: ProbeRun, min_patches: int, outcome: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the test of each effect in each class with cases in `MIN_IMAGES` images, or in as many groups of images.

    Returns:
        [{"effect", "class", "images", "cases", "value", "ci95", "p", "p_holm", "verdict"}]. "ci95" is for the class
        alone. The verdict is of "p_holm", adjusted over the classes of an effect: below 0.05, "holds" or "reversed".
    """
    swaps = random_swaps(run.metrics["images"], seed=run.metrics["seed"], groups=run.groups)
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, cases in _cases_by_class(run, read_knockout(run, folder), min_patches, outcome).items():
        if not _enough_units(run, cases):
            continue
        effects, values = later_effects(cases)
        mean, resampled = cases.mean(values, run.weights)
        p, _ = p_values(cases.swapped_mean(values, swaps))
        for i, effect in enumerate(effects):
            value = mean[i].item()
            row = {"effect": effect, "class": name, **cases.counts, "value": value}
            rows.setdefault(effect, []).append(row | {"ci95": interval(value, resampled[:, i]), "p": p[i].item()})
    for effect, entries in rows.items():
        for row, adjusted in zip(entries, holm([row["p"] for row in entries]), strict=True):
            row["p_holm"] = adjusted
            row["verdict"] = judge_effect(claimed_sign(effect, outcome), row["value"], adjusted < 0.05)
    return [row for entries in rows.values() for row in entries]


def _judged_mean(effect: str, outcome: str, effects: dict[str, Estimate], units: Mapping | None = None) -> dict:
    """Return the mean over classes with its verdict; None as the verdict of a single unit."""
    mean = mean_over_classes(effects, units)
    if mean["ci95"] is None:
        return mean | {"verdict": None}
    low, high = mean["ci95"]
    return mean | {"verdict": judge_effect(claimed_sign(effect, outcome), mean["value"], low > 0 or high < 0)}


def read_knockout(run: ProbeRun, folder: Path | None = None) -> dict[str, Tensor]:
    """Return the content of knockout.safetensors, of the run or of `folder`; {} without it."""
    path = (folder or run.path) / "knockout.safetensors"
    return read_tensors(path) if path.is_file() else {}


def _cases_by_class(
    run: ProbeRun, tensors: dict[str, Tensor], min_patches: int, outcome: str = "rate"
) -> dict[str, Cases]:
    """Return the cases of each class that has them in `MIN_IMAGES` images."""
    by_class = {name: select_cases(tensors, min_patches, [name], outcome) for name in run.metrics["classes"]}
    return {name: cases for name, cases in by_class.items() if cases and cases.counts["images"] >= MIN_IMAGES}


def _enough_units(run: ProbeRun, cases: Cases) -> bool:
    """Return whether the units that are swapped together, images or groups of them, are enough for a test."""
    units = cases.images if run.groups is None else run.groups[cases.images]
    return len(units.unique()) >= MIN_IMAGES


def later_effects(cases: Cases) -> tuple[list[str], Tensor]:
    """Return the names of the effects and their values in the later half of the layers, f[C, E]."""
    later = {condition: later_half(values) for condition, values in cases.rates.items()}
    incorrect, correct = later["incorrect"], later["correct"]
    specific = lambda control: correct - incorrect - (later[f"{control}_correct"] - later[f"{control}_incorrect"])
    effects = {"knockout_incorrect": incorrect - later["none"], "knockout_correct": correct - later["none"]}
    effects["knockout_specificity"] = specific("random")
    if "matched_correct" in later:
        effects["knockout_incorrect_matched"] = incorrect - later["matched_incorrect"]
        effects["knockout_correct_matched"] = correct - later["matched_correct"]
        effects["knockout_specificity_matched"] = specific("matched")
    return list(effects), torch.stack(list(effects.values()), 1)
