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
often confused, no sample of others, and the same in every resampling, as the classes of a mIoU are.

Shapes: C cases, E effects, R resamplings, N images.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from probes.ops.quantiles import normal_quantile, student_quantile
from probes.runs.probe_run import ProbeRun
from probes.score.estimate import Estimate

from .rates import (
    blocked_classes,
    concat_classes,
    later_half,
    outcome_key,
    select_cases,
)

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
    """Return the effects of a knockout as the paper measures them, and the contrasts "EFFECT@random".

    Args:
        run: The run.
        tensors: Content of knockout.safetensors.
    """
    effects = rate_effects(tensors, run.weights)
    for name, contrast in patch_contrasts(run, tensors).items():
        effects[f"{name}@random"] = contrast
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


def patch_contrasts(run: ProbeRun, tensors: dict[str, Tensor]) -> dict[str, Estimate]:
    """Return the contrast of each effect with random tokens.

    It is about "n": the number of images, mistaken patches and pairs of classes. {} if the cases of pairs with both
    kinds of mistakes are in fewer than `MIN_IMAGES` images, or groups of images.
    """
    cases = paired_cases(tensors, run.metrics["classes"])
    if cases is None:
        return {}
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
        for name, contrast in zip(EFFECTS, contrasts, strict=True)
    }


def paired_cases(tensors: dict[str, Tensor], classes: list[str]) -> PairedCases | None:
    """Return the cases in knockout.safetensors of pairs with both kinds of mistakes; None without any."""
    incorrect = _left(tensors, "incorrect") - _left(tensors, "random_incorrect")
    correct = _left(tensors, "correct") - _left(tensors, "random_correct")
    values = torch.stack([incorrect, correct, correct - incorrect], 1)
    by_class = []
    for name in blocked_classes(tensors):
        images = tensors[f"{name}/image"]
        by_class.append(torch.full_like(images, classes.index(name)))
    wrong = torch.cat(by_class)
    true = _read(tensors, "correct_class")
    first = torch.minimum(wrong, true)
    second = torch.maximum(wrong, true)
    pair = first * len(classes) + second
    forward = wrong > true
    has_forward = torch.isin(pair, pair[forward])
    has_backward = torch.isin(pair, pair[~forward])
    both = has_forward & has_backward
    if not both.any():
        return None
    _, number = torch.unique(pair[both], return_inverse=True)
    return PairedCases(
        values=values[both],
        patches=_read(tensors, "patches")[both].double(),
        image=_read(tensors, "image")[both],
        pair=number,
        forward=forward[both],
    )


def _left(tensors: dict[str, Tensor], condition: str) -> Tensor:
    """Return the share of the mistaken patches that a condition leaves, over the later half of the layers, f64[C]."""
    outcome = _read(tensors, outcome_key(OUTCOME, condition))
    return later_half(outcome).double()


def _read(tensors: dict[str, Tensor], key: str) -> Tensor:
    """Return what is known of the cases of all classes."""
    return concat_classes(tensors, key, None)


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
        spread = mean.resampled - mean.value
        contrasts.append(Estimate(mean.value, mean.value + wider * spread))
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
