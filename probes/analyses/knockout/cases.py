"""The cases of a knockout: images in which patches are wrongly predicted as a class c (App. C.1).

    layer 0          the adapter's probe
    n_c(0)           patches wrongly predicted as c: labelled, and most of their labelled pixels are of another class
    n_c(l)           the same count at layer l over all patches: n_c(l) / n_c(0) can exceed 1, as in Fig. 11
    correct class    most frequent true class of the patches in n_c(0); the first in the list of classes if tied
    B_c              patches that the probe at site `block_by` predicts as c, correctly or not (Eq. 1)

The outcomes of a case at layer l, under one condition:

    rate             n_c(l) / n_c(0), the paper's; unbounded
    still_wrong      share of the patches in n_c(0) that are still predicted as c: within 0..1, so without new mistakes,
                     and where none is corrected, nothing can make it worse

The tokens that each condition blocks:

    incorrect, correct   B_c, and B of the correct class
    random_X             as many tokens as X, drawn at random several times

Blocking any token can hurt. Random tokens avoid those of high norm, often attention sinks (Neo et al., 2410.07149),
while others are left.

The paper does not say which layer's predictions define B_c. The adapter's are the default, as for n_c(0). Its text
speaks of correctly classified tokens, but Eq. 1 blocks all that are predicted as c.

Shapes: B images, C cases, K classes, T patches, L layers.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.models.frozen_mllm import FrozenMLLM
from probes.models.knockout import knockout_of
from probes.models.sites import ADAPTER
from probes.runs.read import ProbeRun

from . import KnockoutOptions

SETS = ("incorrect", "correct")
CONDITIONS = ("none", *SETS, "random_incorrect", "random_correct")
# fields of a case in knockout.safetensors
CASE_KEYS = ("image", "patches", "anchors", "correct_class")
Outcomes = dict[str, Tensor]  # f[L + 1] by name


def outcome_key(outcome: str, condition: str) -> str:
    """Return the key of a condition's outcome in knockout.safetensors; the paper's rate has the condition's name."""
    return condition if outcome == "rate" else f"{outcome}:{condition}"


class PatchReader:
    """Predict the class of each patch at each layer, with the model and the probes of a run that has all layers."""

    def __init__(self, run: ProbeRun):
        self.mllm: FrozenMLLM = run.mllm()
        self.layers = run.layers
        device = self.mllm.device
        self.probes = {site: probe.to(device) for site, probe in run.probes().items()}

    def predict(self, states: dict[str, Tensor]) -> Tensor:
        """Return the predicted class of each patch, long[L + 1, B, T], from the states f[B, T, d] of each layer."""
        predicted = []
        for site in self.layers:
            logits = self.probes[site](states[site].float())
            predicted.append(logits.argmax(-1))
        return torch.stack(predicted).cpu()


@dataclass
class ConfusionCase:
    """An image in which patches are wrongly predicted as a class c."""

    image: int  # index in the split
    row: int  # position in the batch
    patches: int  # n_c(0)
    anchors: int  # number of tokens in blocked["correct"]
    wrong_class: int  # c
    correct_class: int  # most frequent true class of the mistaken patches
    mistaken: Tensor  # bool[T], the patches in n_c(0)
    truth: Tensor  # long[T], true classes, -1 if unlabelled
    # bool[T] by condition: "incorrect" (B_c), "correct" (B of the correct class)
    blocked: dict[str, Tensor]

    def outcomes(self, predicted: Tensor) -> dict[str, Tensor]:
        """Return the outcomes at each layer, f[L + 1] by name, from the predictions long[L + 1, T]."""
        as_wrong = predicted == self.wrong_class
        is_other = (self.truth != self.wrong_class) & (self.truth >= 0)
        count = (as_wrong & is_other).sum(-1)
        return {
            "rate": count / self.patches,
            "still_wrong": as_wrong[:, self.mistaken].float().mean(-1),
        }


def find_cases(
    predicted: Tensor,
    truth: Tensor,
    index: Sequence[int],
    wrong_class: int,
    block_layer: int = 0,
    min_patches: int = 1,
) -> list[ConfusionCase]:
    """Return the images with at least `min_patches` patches wrongly predicted as `wrong_class` at layer 0.

    Args:
        predicted: long[L + 1, B, T] of the unmodified model.
        truth: long[B, T], -1 for unlabelled patches.
        index: B indices in the split.
        wrong_class, min_patches: c, and the smallest n_c(0) of a case.
        block_layer: Layer whose predictions define the blocked tokens.
    """
    cases = []
    for row, image in enumerate(index):
        true = truth[row]
        reference = predicted[block_layer, row]
        other_class = (true != wrong_class) & (true >= 0)
        mistaken = (predicted[0, row] == wrong_class) & other_class
        if mistaken.sum() < min_patches:
            continue
        correct_class = true[mistaken].mode().values.item()
        blocked = {"incorrect": reference == wrong_class, "correct": reference == correct_class}
        case = ConfusionCase(
            image=image,
            row=row,
            patches=int(mistaken.sum()),
            anchors=int(blocked["correct"].sum()),
            wrong_class=wrong_class,
            correct_class=correct_class,
            mistaken=mistaken,
            truth=true,
            blocked=blocked,
        )
        cases.append(case)
    return cases


def high_norm_tokens(states: Tensor) -> np.ndarray:
    """Return the tokens whose norm exceeds the mean by two standard deviations, bool[T], from states f[T, d]."""
    norm = states.float().norm(dim=-1).cpu().numpy()
    return norm > norm.mean() + 2 * norm.std()


def blocked_by_condition(
    case: ConfusionCase, high_norm: np.ndarray, options: KnockoutOptions
) -> dict[str, list[Tensor]]:
    """Return the blocked tokens bool[T] by condition, one or several draws.

    Each draw is seeded by seed, image, class and condition, so no condition changes the draws of another.
    """
    tokens: dict[str, list[Tensor]] = {name: [case.blocked[name]] for name in SETS}
    for name in SETS:
        condition = f"random_{name}"
        seed = [options.seed, case.image, case.wrong_class, zlib.crc32(condition.encode())]
        rng = np.random.default_rng(seed)
        count = int(case.blocked[name].sum())
        tokens[condition] = [draw_tokens(count, high_norm, rng) for _ in range(options.draws)]
    return tokens


def draw_tokens(count: int, high_norm: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Draw `count` tokens, bool[T]; those of high norm only if the others do not suffice."""
    order = rng.permutation(len(high_norm))
    order = order[np.argsort(high_norm[order], kind="stable")]
    drawn = torch.zeros(len(order), dtype=torch.bool)
    drawn[torch.from_numpy(order[:count])] = True
    return drawn


class ForwardRow(NamedTuple):
    """One row of a forward: which tokens of a case are blocked."""

    case: int  # index of the case
    condition: str
    blocked: Tensor  # bool[T]

    @property
    def identity(self) -> tuple[int, bytes]:
        """What the forward depends on."""
        return self.case, self.blocked.numpy().tobytes()


def knock_out_batch(
    reader: PatchReader,
    options: KnockoutOptions,
    classes: list[str],
    samples: Mapping[int, Mapping[str, Any]],
) -> dict[str, Tensor]:
    """Return the results of images of the split, by "class/key", one row per case; {} without cases.

    All cases and conditions share forwards.

    Args:
        reader: The model and its probes.
        options: What to run.
        classes: The names of all classes.
        samples: Images and targets by index.
    """
    mllm = reader.mllm
    pixels = mllm.preprocess([sample["image"] for sample in samples.values()])
    states = mllm.states(pixels, reader.layers)
    predicted = reader.predict(states)
    truth = []
    for sample in samples.values():
        patches = mllm.geometry.patches(sample["target"])
        truth.append(patches.flatten())
    cases: list[ConfusionCase] = []
    for name in options.classes:
        cases += find_cases(
            predicted,
            truth=torch.stack(truth),
            index=[*samples],
            wrong_class=classes.index(name),
            block_layer=reader.layers.index(options.block_by),
            min_patches=options.min_patches,
        )
    adapter = states[ADAPTER]
    del states  # of every layer; the forwards under a knockout need the memory
    rows = _forward_rows(cases, adapter, options)
    measured = _run_rows(reader, pixels=pixels, cases=cases, rows=rows, options=options)
    tensors: dict[str, list[Tensor]] = {}
    for case, outcomes in zip(cases, measured, strict=True):
        values = {key: torch.tensor(getattr(case, key)) for key in CASE_KEYS}
        outcomes["none"] = [case.outcomes(predicted[:, case.row])]
        for condition, draws in outcomes.items():
            for name in draws[0]:
                of_draws = torch.stack([draw[name] for draw in draws])
                values[outcome_key(name, condition)] = of_draws.mean(0)
        for key, value in values.items():
            tensors.setdefault(f"{classes[case.wrong_class]}/{key}", []).append(value)
    return {key: torch.stack(values) for key, values in tensors.items()}


def _forward_rows(
    cases: list[ConfusionCase], adapter: Tensor, options: KnockoutOptions
) -> list[ForwardRow]:
    """Return a row for each draw of each condition of each case, from the adapter's states f[B, T, d]."""
    rows = []
    for i, case in enumerate(cases):
        high_norm = high_norm_tokens(adapter[case.row])
        for condition, draws in blocked_by_condition(case, high_norm, options).items():
            rows += [ForwardRow(i, condition, draw) for draw in draws]
    return rows


def _run_rows(
    reader: PatchReader,
    pixels: Tensor,
    cases: list[ConfusionCase],
    rows: list[ForwardRow],
    options: KnockoutOptions,
) -> list[dict[str, list[Outcomes]]]:
    """Return the outcomes of each draw by case and condition; identical rows run once."""
    distinct = {row.identity: row for row in rows}
    measured: dict[tuple[int, bytes], Outcomes] = {}
    for start in range(0, len(distinct), options.batch_size):
        chunk = [*distinct.values()][start : start + options.batch_size]
        in_batch = [cases[row.case].row for row in chunk]
        images = sorted(set(in_batch))
        blocked = torch.stack([row.blocked for row in chunk])
        states = reader.mllm.states(
            pixels[images],
            reader.layers,
            knockout_of(blocked, options.layers),
            rows=[images.index(image) for image in in_batch],
        )
        predicted = reader.predict(states)
        for i, row in enumerate(chunk):
            measured[row.identity] = cases[row.case].outcomes(predicted[:, i])
    by_case: list[dict[str, list[Outcomes]]] = [{} for _ in cases]
    for row in rows:
        by_case[row.case].setdefault(row.condition, []).append(measured[row.identity])
    return by_case
