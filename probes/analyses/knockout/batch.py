"""The knockout of one batch of images: all cases, conditions and places share forwards.

Shapes: B images, C cases, T patches, L layers, A heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.evaluation.metrics import true_classes
from probes.models.frozen_mllm import ADAPTER
from probes.models.knockout import Knockout

from .attention import attention_from, by_group
from .cases import ConfusionCase, PatchReader, find_cases
from .conditions import MatchingFeatures, balance, conditions
from .config import Plan
from .layer_sweep import SWEEP_CONDITIONS, CutLocation, places_of

FACTS = ("image", "patches", "anchors", "correct_class")


class ForwardRow(NamedTuple):
    """One row of a forward: what of a case is blocked, and where."""

    case: int
    what: str
    blocked: Tensor
    place: CutLocation


def knock_out(reader: PatchReader, plan: Plan, classes: list[str], batch: dict) -> dict[str, Tensor]:
    """What is kept of a batch: by "class/what" one row a case, see knockout.py; empty if no image has one.

    Args:
        reader: Model and probes.
        plan: What is done to each case.
        classes: Names of all K.
        batch: As data/prepared.py collates it.
    """
    pixels, mllm = batch["pixels"], reader.mllm
    predicted, truth = reader.predict(pixels), true_classes(batch["target"], len(classes), mllm)
    reference = reader.layers.index(plan.labels_from)
    cases = [
        case
        for name in plan.classes
        for case in find_cases(
            predicted, truth, batch["index"], classes.index(name), reference, plan.min_patches, plan.anchors
        )
    ]
    if not cases:
        return {}
    kept = [{fact: torch.tensor(getattr(case, fact)) for fact in FACTS} for case in cases]
    for case, rows in zip(cases, kept, strict=True):
        rows["none"] = case.wrong(predicted[:, case.row]) / case.patches
    adapter, (visible, others) = mllm.states(pixels, [ADAPTER])[ADAPTER], reader.visible()
    looks = plan.attention or "mass" in plan.controls
    attention = attention_from(mllm, pixels, [(case.row, case.mistaken) for case in cases]) if looks else None
    places, jobs = places_of(plan.windows, plan.heads, len(reader.layers) - 1, reader.attention_heads), []
    for i, case in enumerate(cases):
        mass = attention[0][i].mean(0) if looks else None
        around = MatchingFeatures.of(case, mllm.grid, visible, adapter[case.row], mass)
        blocked = conditions(case, around, plan.controls, plan.draws, plan.doses, plan.reverse, plan.seed)
        kept[i] |= {f"balance:{what}": balance(case, around, what, draws) for what, draws in blocked.items()}
        if plan.attention:
            kept[i] |= attention_shares(case, attention[0][i], attention[1][i], visible, others)
        jobs += [
            ForwardRow(i, what, draw, CutLocation(plan.layers)) for what, draws in blocked.items() for draw in draws
        ]
        jobs += [
            ForwardRow(i, f"swept:{what}", blocked[what][0], place) for what in SWEEP_CONDITIONS for place in places
        ]
    for (i, what), counts in _wrong_counts(reader, pixels, cases, jobs, plan.batch_size).items():
        rates = counts / cases[i].patches
        kept[i][what] = rates if what.startswith("swept:") else rates.mean(0)
    tensors: dict[str, list[Tensor]] = {}
    for case, rows in zip(cases, kept, strict=True):
        for what, value in rows.items():
            tensors.setdefault(f"{classes[case.wrong_class]}/{what}", []).append(value)
    return {key: torch.stack(values) for key, values in tensors.items()}


def _wrong_counts(
    reader: PatchReader, pixels: Tensor, cases: list[ConfusionCase], jobs: list[ForwardRow], batch_size: int
) -> dict[tuple[int, str], Tensor]:
    """n_c(l) of all jobs of a case and what is done to it, f[jobs, L + 1]; what is the same is run once."""
    depth, run = len(reader.layers) - 1, {}
    same = [(job.case, job.blocked.numpy().tobytes(), job.place.among(depth)) for job in jobs]
    distinct = list(dict(zip(same, jobs, strict=True)).items())
    for start in range(0, len(distinct), batch_size):
        keys, chunk = zip(*distinct[start : start + batch_size], strict=True)
        predicted = reader.predict(pixels[[cases[job.case].row for job in chunk]], _knockout(reader, chunk))
        run |= {
            key: cases[job.case].wrong(predicted[:, j]) for j, (key, job) in enumerate(zip(keys, chunk, strict=True))
        }
    counts: dict[tuple[int, str], list[Tensor]] = {}
    for key, job in zip(same, jobs, strict=True):
        counts.setdefault((job.case, job.what), []).append(run[key])
    return {key: torch.stack(rows) for key, rows in counts.items()}


def _knockout(reader: PatchReader, jobs: Sequence[ForwardRow]) -> Knockout:
    """That of a forward with one row a job."""
    blocked = [job.blocked for job in jobs]
    if any(one.ndim == 2 for one in blocked):
        blocked = [one.expand(one.shape[-1], -1) for one in blocked]
    layers = [_members(job.place.layers, len(reader.layers) - 1, 1) for job in jobs]
    heads = None
    if any(job.place.heads is not None for job in jobs):
        heads = torch.stack([_members(job.place.heads, reader.attention_heads, 0) for job in jobs])
    return Knockout(torch.stack(blocked), torch.stack(layers), heads)


def _members(chosen: Sequence[int] | None, count: int, first: int) -> Tensor:
    """bool[count], true at the chosen numbers, which count from `first`; at all for None."""
    return torch.tensor([chosen is None or number in chosen for number in range(first, first + count)])


def attention_shares(
    case: ConfusionCase, attention: Tensor, itself: Tensor, visible: Tensor, others: Tensor
) -> dict[str, Tensor]:
    """Where mistaken patches look, by group f[L, 5], and where they would if they looked at all that they see alike.

    Args:
        case: Its patches.
        attention: f[L, T], theirs.
        itself: f[L], of it to themselves.
        visible: bool[T, T].
        others: long[T], tokens that are no image that each sees.
    """
    correct, incorrect = case.blocked["correct"] & ~case.mistaken, case.blocked["incorrect"] | case.mistaken
    seen = visible[case.mistaken].float()
    alike = 1 / (seen.sum(1) + others[case.mistaken])  # the share of each token that a patch sees, itself included
    return {
        "attention": by_group(attention, itself, correct, incorrect),
        "uniform": by_group((seen * alike[:, None]).mean(0)[None], alike.mean()[None], correct, incorrect)[0],
    }
