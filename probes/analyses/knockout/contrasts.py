"""The effects of a knockout as numbers over images, for the claims of a report.

As the paper measures it, an effect is the mean over cases of n_c(l) / n_c(0) with a class blocked minus the same with
nothing blocked. It counts new mistakes of any patch, and a case with one mistaken patch can weigh as much as a hundred
others. A contrast is per mistaken patch: the share of the patches in n_c(0) that are still predicted as c with the
class's own tokens blocked, minus the same with as many other tokens blocked. Nothing blocked would be no control, since
blocking any tokens moves some patches away from c.

A shift of the probe's criterion towards one class of a pair corrects one of the two kinds of mistakes and adds to the
other. Contrasts therefore balance the two: within a pair of classes a, b, "a called b" and "b called a" have the same
weight. Pairs are weighted by how many patches they balance, N_a N_b / (N_a + N_b), as Mantel and Haenszel weigh strata.

The unit is the image, as in all other claims. The classes are those that were blocked: few, chosen because they are
often confused, no sample of others, and the same in every resampling, as the classes of a mIoU are. The spread over
pairs stands beside a contrast and is no part of its interval.

Shapes: C cases, E effects, R resamplings, N images.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import scipy.stats
import torch
from torch import Tensor

from probes.evaluation.estimate import Estimate
from probes.results.probe_run import ProbeRun

from .rates import (
    blocked_classes,
    concat_classes,
    later_half,
    list_conditions,
    outcome_key,
    select_cases,
)
from .schema import CONTROLS, SETS

OUTCOME = "still_wrong"  # of a contrast, see cases.py
MIN_IMAGES = 6  # fewer, or fewer groups of images, have no interval that says anything
EFFECTS = ("knockout_incorrect", "knockout_correct", "knockout_specificity")


class PairedCases(NamedTuple):
    """Cases of pairs of classes that are mistaken for each other in both directions."""

    values: Tensor  # effects in the order of `EFFECTS`, per mistaken patch, f[C, E]
    patches: Tensor  # n_c(0), f[C]
    image: Tensor  # long[C]
    pair: Tensor  # index of the pair, long[C]
    forward: Tensor  # bool[C], whether the first class of the pair is called the second


def knockout_effects(run: ProbeRun, tensors: dict[str, Tensor]) -> dict[str, Estimate]:
    """Return the effects of a knockout as the paper measures them, and the contrasts "EFFECT@CONTROL".

    Args:
        run: The run.
        tensors: Content of knockout.safetensors.
    """
    controls = [name for name in CONTROLS if f"{name}_correct" in list_conditions(tensors)]
    effects = {
        name: replace(estimate, about={"controls": controls})
        for name, estimate in rate_effects(tensors, run.weights).items()
    }
    for control in controls:
        contrasts = patch_contrasts(run, tensors, control)
        effects |= {f"{name}@{control}": estimate for name, estimate in contrasts.items()}
    return effects


def rate_effects(tensors: dict[str, Tensor], weights: Tensor) -> dict[str, Estimate]:
    """Return each effect as the paper measures it, as a mean over cases; {} without cases.

    Args:
        tensors: Content of knockout.safetensors.
        weights: f[R, N], of the bootstrap.
    """
    if not (cases := select_cases(tensors)):
        return {}
    later = {condition: later_half(rates) for condition, rates in cases.rates.items()}
    incorrect = later["incorrect"] - later["none"]
    correct = later["correct"] - later["none"]
    random = later["random_correct"] - later["random_incorrect"]
    effects = torch.stack([incorrect, correct, correct - incorrect - random], 1)
    mean, resampled = cases.mean(effects, weights)
    return {name: Estimate(mean[i].item(), resampled[:, i]) for i, name in enumerate(EFFECTS)}


def patch_contrasts(run: ProbeRun, tensors: dict[str, Tensor], control: str) -> dict[str, Estimate]:
    """Return the contrast of each effect with "random" or "matched" tokens.

    It is about "n": the number of images, mistaken patches and pairs of classes; and "over_pairs", the mean over pairs
    of :func:`mean_over_classes`. {} without a knockout, or if the cases of pairs with both kinds of mistakes are in
    fewer than `MIN_IMAGES` images, or groups of images.
    """
    cases = paired_cases(tensors, run.metrics["classes"], control)
    if cases is None:
        return {}
    unit = cases.image if run.groups is None else run.groups[cases.image]
    if len(unit.unique()) < MIN_IMAGES:
        return {}
    means, by_pair = contrast_estimates(cases, run.weights, run.groups)
    counts = {
        "images": len(cases.image.unique()),
        "patches": int(cases.patches.sum()),
        "pairs": len(by_pair),
    }

    def spread(i):
        return mean_over_classes({str(j): of_pair[i] for j, of_pair in enumerate(by_pair)})

    return {
        name: replace(means[i], about={"n": counts, "over_pairs": spread(i)})
        for i, name in enumerate(EFFECTS)
    }


def paired_cases(
    tensors: dict[str, Tensor], classes: list[str], control: str
) -> PairedCases | None:
    """Return the cases in knockout.safetensors of pairs with both kinds of mistakes; None without any."""
    if f"{control}_correct" not in list_conditions(tensors):
        return None

    def read(key):
        return concat_classes(tensors, key, None)

    def later(condition):
        return later_half(read(outcome_key(OUTCOME, condition))).double()

    incorrect, correct = (later(name) - later(f"{control}_{name}") for name in SETS)
    values = torch.stack([incorrect, correct, correct - incorrect], 1)
    wrong = torch.cat(
        [
            torch.full_like(tensors[f"{name}/image"], classes.index(name))
            for name in blocked_classes(tensors)
        ]
    )
    true = read("correct_class")
    patches = read("patches")
    image = read("image")
    pair = torch.minimum(wrong, true) * len(classes) + torch.maximum(wrong, true)
    forward = wrong > true
    both = torch.isin(pair, pair[forward]) & torch.isin(pair, pair[~forward])
    if not both.any():
        return None
    pair = torch.unique(pair[both], return_inverse=True)[1]
    return PairedCases(
        values[both],
        patches[both].double(),
        image[both],
        pair,
        forward[both],
    )


def contrast_estimates(
    cases: PairedCases, weights: Tensor, groups: Tensor | None = None
) -> tuple[list[Estimate], list[list[Estimate]]]:
    """Return the contrast of each effect, over all pairs and for each pair, under bootstrap weights f[R, N].

    The bootstrap's spread is too small for few images, of which some have most of the patches: the one over all pairs
    is widened to Student's t with as many degrees of freedom as Kish's effective number of images, or groups, less one.
    """
    sums, tokens = balance(cases, torch.cat([torch.ones_like(weights[:1]), weights]))

    def estimates(values):
        return [Estimate.from_vector(of_effect) for of_effect in values.T]

    unit = cases.image if groups is None else groups[cases.image]
    patches = torch.zeros(int(unit.max()) + 1, dtype=torch.float64).index_add_(
        0, unit, cases.patches
    )
    df = (patches.sum().square() / patches.square().sum()).item() - 1
    tails = scipy.stats.t.ppf(0.975, df) / scipy.stats.norm.ppf(0.975)
    wider = float(tails) * ((df + 1) / df) ** 0.5
    means = estimates(sums.sum(0) / tokens.sum(0)[:, None])
    widened = [
        Estimate(mean.value, mean.value + wider * (mean.resampled - mean.value)) for mean in means
    ]
    return widened, [estimates(of_pair) for of_pair in sums / tokens[..., None]]


def balance(cases: PairedCases, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each pair the weighted sum of effects f[P, R, E] and the weight f[P, R], from f[R, N] of images."""
    weights = weights.double()[:, cases.image] * cases.patches
    sums = []
    tokens = []
    for pair in range(int(cases.pair.max()) + 1):
        kinds = [(cases.pair == pair) & (cases.forward == forward) for forward in (True, False)]
        (sum_a, n_a), (sum_b, n_b) = (
            (weights[:, x] @ cases.values[x], weights[:, x].sum(1)) for x in kinds
        )
        total = (n_a + n_b).clamp(min=1)  # a resampling can lack the pair
        crossed = sum_a * n_b[:, None] + sum_b * n_a[:, None]
        sums.append(crossed / (2 * total[:, None]))
        tokens.append(n_a * n_b / total)
    return torch.stack(sums), torch.stack(tokens)


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
