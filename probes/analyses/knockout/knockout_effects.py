"""Rates and effects of a knockout as numbers over images, for knockout.json, the report and its claims.

As the paper measures it, an effect is the mean over cases of n_c(l) / n_c(0) with a class blocked minus the same with
nothing blocked. It counts new mistakes of any patch, and a case with one mistaken patch can weigh as much as a hundred
others. A contrast is per mistaken patch: the share of the patches in n_c(0) that are still predicted as c with the
class's own tokens blocked, minus the same with as many other tokens blocked. Nothing blocked would be no control, since
blocking any tokens moves some patches away from c.

A shift of the probe's criterion towards one class of a pair corrects one of the two kinds of mistakes and adds to the
other. Contrasts therefore balance the two: within a pair of classes a, b, "a called b" and "b called a" have the same
weight. Pairs are weighted by how many patches they balance, N_a N_b / (N_a + N_b), as Mantel and Haenszel weigh strata.

The unit is the image, as in all other claims. The classes are those that were blocked: few, chosen because they are
often confused, no sample of others, and the same in every resampling, as the classes of a mIoU are.

Shapes: C cases, E effects, L layers, R resamplings, N images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from probes.runs.read import ProbeRun
from probes.score.estimate import Estimate, EstimateEntry, normal_quantile, student_quantile

from . import KnockoutOptions
from .cases import CONDITIONS, outcome_key

OUTCOME = "still_wrong"  # of a contrast, see cases.py
MIN_IMAGES = 6  # fewer, or fewer groups of images, have no interval that says anything
KNOCKOUT_EFFECTS = ("knockout_incorrect", "knockout_correct", "knockout_specificity")

Tensors = dict[str, Tensor]  # content of knockout.safetensors


# ------------------------------------------------------------------------------------------ rates
def select_cases(tensors: Tensors, classes: Sequence[str] | None = None) -> Tensors:
    """Return what is known of the cases of some classes (None: all), by key; "class" has the number of each case's.

    Classes are in alphabetical order, and numbered so; {} without cases.
    """
    # a name is CLASS/KEY, and a class can have a "/"
    by_class: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        class_name, _, key = name.rpartition("/")
        by_class.setdefault(class_name, {})[key] = tensor
    values: dict[str, list[Tensor]] = {}
    for number, name in enumerate(sorted(by_class)):
        if classes is None or name in classes:
            of_class = by_class[name]
            of_class["class"] = torch.full_like(of_class["image"], number)
            for key, tensor in of_class.items():
                values.setdefault(key, []).append(tensor)
    return {key: torch.cat(of_classes) for key, of_classes in values.items()}


def mean_over_cases(values: Tensor, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of values f[C, ...], and those under weights f[R, N] of the cases' images long[C], f[R, ...]."""
    weights = weights.double()[:, images]
    values = values.double()
    total = weights.sum(1)
    for _ in values.shape[1:]:
        total = total[..., None]
    resampled = torch.tensordot(weights, values, 1) / total
    return values.mean(0), resampled


Rates = TypedDict(
    "Rates",
    {
        "class": str,
        "images": int,
        "remaining": dict[str, list[float]],  # by condition, at each layer
        "ci95": dict[str, list[list[float]]],
    },
)


class KnockoutRows(TypedDict):
    """Content of knockout.json."""

    layers: tuple[int, ...] | str
    classes: list[Rates]
    all: Rates
    effects: dict[str, EstimateEntry]


def knockout_rows(
    run: ProbeRun, options: KnockoutOptions, tensors: Tensors, effects: Mapping[str, Estimate]
) -> KnockoutRows:
    """Return the rows of knockout.json."""
    return {
        "layers": options.layers or "all",
        "classes": [_rates(run, tensors, [name]) for name in options.classes],
        "all": _rates(run, tensors, options.classes),
        "effects": {name: effect.json() for name, effect in effects.items()},
    }


def _rates(run: ProbeRun, tensors: Tensors, classes: Sequence[str]) -> Rates:
    """Return n_c(l) / n_c(0) over the cases of some classes, with intervals over images, by condition."""
    cases = select_cases(tensors, classes)
    name = "all"
    if len(classes) == 1:
        (name,) = classes
    entry: Rates = {
        "class": name,
        "images": len(cases.get("image", ())),
        "remaining": {},
        "ci95": {},
    }
    if not cases:
        return entry
    for condition in CONDITIONS:
        mean, resampled = mean_over_cases(cases[condition], cases["image"], run.weights)
        entry["remaining"][condition] = mean.tolist()
        entry["ci95"][condition] = [
            Estimate(value, of_layer).ci95
            for value, of_layer in zip(mean.tolist(), resampled.T, strict=True)
        ]
    return entry


def later_half(rates: Tensor) -> Tensor:
    """Return the mean over the later half of the layers, f[C], of rates f[C, L + 1]."""
    last = rates.shape[1] - 1
    return rates[:, last // 2 + 1 :].mean(1)


# ------------------------------------------------------------------------------------------ effects
class PairedCases(NamedTuple):
    """Cases of pairs of classes that are mistaken for each other in both directions."""

    values: Tensor  # effects in the order of `KNOCKOUT_EFFECTS`, per mistaken patch, f[C, E]
    patches: Tensor  # n_c(0), f[C]
    image: Tensor  # long[C]
    pair: Tensor  # index of the pair, long[C]
    forward: Tensor  # bool[C], whether the first class of the pair is called the second


def knockout_effects(run: ProbeRun, tensors: Tensors) -> dict[str, Estimate]:
    """Return the effects of a knockout as the paper measures them, and the contrasts "EFFECT@random"; {} without cases.

    Args:
        run: The run.
        tensors: Content of knockout.safetensors.
    """
    cases = select_cases(tensors)
    later = {condition: later_half(cases[condition]) for condition in CONDITIONS}
    incorrect = later["incorrect"] - later["none"]
    correct = later["correct"] - later["none"]
    random = later["random_correct"] - later["random_incorrect"]
    specific = correct - incorrect - random
    values = torch.stack([incorrect, correct, specific], 1)
    mean, resampled = mean_over_cases(values, cases["image"], run.weights)
    effects = {}
    for i, name in enumerate(KNOCKOUT_EFFECTS):
        effects[name] = Estimate(mean[i].item(), resampled[:, i])
    for name, contrast in patch_contrasts(run, tensors).items():
        effects[f"{name}@random"] = contrast
    return effects


def patch_contrasts(run: ProbeRun, tensors: Tensors) -> dict[str, Estimate]:
    """Return the contrast of each effect with random tokens.

    It is about "n": the number of images, mistaken patches and pairs of classes. {} if the cases of pairs with both
    kinds of mistakes are in fewer than `MIN_IMAGES` images, or groups of images.
    """
    cases = paired_cases(tensors, run.metrics["classes"])
    unit = cases.image if run.groups is None else run.groups[cases.image]
    if len(unit.unique()) < MIN_IMAGES:
        return {}
    counts = {
        "images": len(cases.image.unique()),
        "patches": int(cases.patches.sum()),
        "pairs": len(cases.pair.unique()),
    }
    contrasts = contrast_estimates(cases, run.weights, run.groups)
    return {
        name: replace(contrast, about={"n": counts})
        for name, contrast in zip(KNOCKOUT_EFFECTS, contrasts, strict=True)
    }


def paired_cases(tensors: Tensors, classes: list[str]) -> PairedCases:
    """Return the cases in knockout.safetensors of pairs with both kinds of mistakes."""
    cases = select_cases(tensors)
    left = {}
    for condition in CONDITIONS:
        still_wrong = cases[outcome_key(OUTCOME, condition)]
        left[condition] = later_half(still_wrong).double()
    incorrect = left["incorrect"] - left["random_incorrect"]
    correct = left["correct"] - left["random_correct"]
    specific = correct - incorrect
    values = torch.stack([incorrect, correct, specific], 1)
    names = sorted({name.rpartition("/")[0] for name in tensors})
    index = torch.tensor([classes.index(name) for name in names])
    wrong = index[cases["class"]]
    true = cases["correct_class"]
    first = torch.minimum(wrong, true)
    second = torch.maximum(wrong, true)
    pair = first * len(classes) + second
    forward = wrong > true
    has_forward = torch.isin(pair, pair[forward])
    has_backward = torch.isin(pair, pair[~forward])
    both = has_forward & has_backward
    _, number = torch.unique(pair[both], return_inverse=True)
    return PairedCases(
        values=values[both],
        patches=cases["patches"][both].double(),
        image=cases["image"][both],
        pair=number,
        forward=forward[both],
    )


def contrast_estimates(
    cases: PairedCases, weights: Tensor, groups: Tensor | None = None
) -> list[Estimate]:
    """Return the contrast of each effect over all pairs, under bootstrap weights f[R, N].

    The bootstrap's spread is too small for few images, of which some have most of the patches: it is widened to
    Student's t with as many degrees of freedom as Kish's effective number of images, or groups, less one.
    """
    once = torch.ones_like(weights[:1])
    sums, tokens = balance(cases, torch.cat([once, weights]))
    vectors = sums.sum(0) / tokens.sum(0)[:, None]
    unit = cases.image if groups is None else groups[cases.image]
    patches = torch.zeros(int(unit.max()) + 1, dtype=torch.float64)
    patches.index_add_(0, unit, cases.patches)
    effective_number = patches.sum().square() / patches.square().sum()
    df = effective_number.item() - 1
    tails = student_quantile(0.975, df) / normal_quantile(0.975)
    wider = float(tails) * ((df + 1) / df) ** 0.5
    contrasts = []
    for vector in vectors.T:
        mean = Estimate.from_vector(vector)
        spread = wider * (mean.resampled - mean.value)
        contrasts.append(Estimate(mean.value, mean.value + spread))
    return contrasts


def balance(cases: PairedCases, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each pair the weighted sum of effects f[P, R, E] and the weight f[P, R], from f[R, N] of images."""
    weights = weights.double()[:, cases.image] * cases.patches
    sums = []
    tokens = []
    for pair in range(int(cases.pair.max()) + 1):
        of_pair = cases.pair == pair
        sum_a, n_a = _weighted(cases, weights, of_pair & cases.forward)
        sum_b, n_b = _weighted(cases, weights, of_pair & ~cases.forward)
        total = (n_a + n_b).clamp(min=1)  # a resampling can lack the pair
        crossed = sum_a * n_b[:, None] + sum_b * n_a[:, None]
        sums.append(crossed / (2 * total[:, None]))
        tokens.append(n_a * n_b / total)
    return torch.stack(sums), torch.stack(tokens)


def _weighted(cases: PairedCases, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of effects f[R, E] and the weight f[R] of some cases."""
    of_chosen = weights[:, chosen]
    return of_chosen @ cases.values[chosen], of_chosen.sum(1)
