"""Knock out one batch of images: all cases, conditions and cut locations share forwards, and layers until they differ.

Shapes: B images, C cases, T patches, L layers, A heads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.evaluation.metrics import true_classes
from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER

from .attention import attention_from, sum_by_group
from .cases import ConfusionCase, PatchReader, find_cases
from .conditions import MatchingFeatures, blocked_by_condition, measure_balance
from .config import Plan
from .effects import outcome_key
from .layer_sweep import SWEEP_CONDITIONS, CutLocation, cut_locations
from .schema import CASE_KEYS, LEAN, OUTCOMES


class ForwardRow(NamedTuple):
    """One row of a forward: which tokens of a case are blocked, and where."""

    case: int  # index of the case
    key: str  # key of the result
    blocked: Tensor  # bool[T] or bool[T, T]
    location: CutLocation


def knock_out_batch(reader: PatchReader, plan: Plan, classes: list[str], batch: dict) -> dict[str, Tensor]:
    """Return the results of a batch, collated by data/batches.py, by "class/key", one row per case.

    `classes` are the names of all classes. Without cases the result is empty.
    """
    pixels, mllm, depth = batch["pixels"], reader.mllm, len(reader.layers) - 1
    states = mllm.states(pixels, reader.layers)
    predicted, truth = reader.predict_states(states), true_classes(batch["target"], len(classes), mllm)
    how = (reader.layers.index(plan.block_by), plan.min_patches, plan.block_set)
    cases: list[ConfusionCase] = []
    for name in plan.classes:
        cases += find_cases(predicted, truth, batch["index"], classes.index(name), *how)
    if not cases:
        return {}
    unmodified = [reader.measure(_take_row(states, case.row), [case])[0] for case in cases]
    adapter, (visible, others) = states[ADAPTER], reader.visible()
    del states  # of every layer; the forwards under a knockout need the memory
    attention = None
    if plan.attention or {"mass", "matched"} & set(plan.controls):
        attention = attention_from(mllm, pixels, [(case.row, case.mistaken) for case in cases])
    locations = cut_locations(plan.layer_windows, plan.attention_heads, depth, reader.attention_heads)
    results: list[dict[str, Tensor]] = []
    rows: list[ForwardRow] = []
    for i, case in enumerate(cases):
        mass = None if attention is None else attention[0][i].mean(0)
        features = MatchingFeatures.from_case(case, mllm.grid, visible, adapter[case.row], mass)
        blocked = blocked_by_condition(case, features, plan)
        result = {key: torch.tensor(getattr(case, key)) for key in CASE_KEYS}
        result |= {outcome_key(name, "none"): values for name, values in unmodified[i].items()}
        result |= {f"balance:{key}": measure_balance(case, features, key, draws) for key, draws in blocked.items()}
        if plan.attention:
            result |= attention_shares(case, attention[0][i], attention[1][i], visible, others)
        results.append(result)
        paper = CutLocation(plan.layers)
        rows += [ForwardRow(i, key, draw, paper) for key, draws in blocked.items() for draw in draws]
        rows += [ForwardRow(i, f"swept:{key}", blocked[key][0], at) for key in SWEEP_CONDITIONS for at in locations]
    for (i, key), outcomes in _run_rows(reader, pixels, cases, rows, plan).items():
        if key.startswith("swept:"):
            results[i][key] = outcomes["rate"]
        else:
            results[i] |= {outcome_key(name, key): values.mean(0) for name, values in outcomes.items()}
    tensors: dict[str, list[Tensor]] = {}
    for case, result in zip(cases, results, strict=True):
        for key, value in result.items():
            tensors.setdefault(f"{classes[case.wrong_class]}/{key}", []).append(value)
    return {key: torch.stack(values) for key, values in tensors.items()}


def _take_row(states: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    return {site: values[row : row + 1] for site, values in states.items()}


def _run_rows(
    reader: PatchReader, pixels: Tensor, cases: list[ConfusionCase], rows: list[ForwardRow], plan: Plan
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Return the outcomes by case and key, f[rows of the key, L + 1] each; identical rows run once."""
    identities = [(row.case, row.blocked.numpy().tobytes(), row.location.key(len(reader.layers) - 1)) for row in rows]
    distinct = list(dict(zip(identities, rows, strict=True)).items())
    measured: dict[tuple, dict[str, Tensor]] = {}
    for start in range(0, len(distinct), plan.batch_size):
        chunk = distinct[start : start + plan.batch_size]
        of_rows = [cases[row.case] for _, row in chunk]
        knockout = _build_knockout(reader, [row for _, row in chunk], plan)
        images = sorted({case.row for case in of_rows})
        row_images = [images.index(case.row) for case in of_rows]
        states = reader.mllm.states(pixels[images], reader.layers, knockout, row_images)
        measured |= zip((identity for identity, _ in chunk), reader.measure(states, of_rows), strict=True)
    by_key: dict[tuple[int, str], list[dict[str, Tensor]]] = {}
    for identity, row in zip(identities, rows, strict=True):
        by_key.setdefault((row.case, row.key), []).append(measured[identity])
    stack = lambda outcomes, name: torch.stack([values[name] for values in outcomes])
    return {key: {name: stack(outcomes, name) for name in (*OUTCOMES, LEAN)} for key, outcomes in by_key.items()}


def _build_knockout(reader: PatchReader, rows: Sequence[ForwardRow], plan: Plan) -> Knockout:
    """Return the knockout of a forward with one batch row per `ForwardRow`."""
    blocked = [plan.block(row.blocked) for row in rows]
    if any(tokens.ndim == 2 for tokens in blocked):
        blocked = [tokens.expand(tokens.shape[-1], -1) for tokens in blocked]
    layers = [_membership(row.location.layers, len(reader.layers) - 1, 1) for row in rows]
    heads = None
    if any(row.location.heads is not None for row in rows):
        heads = torch.stack([_membership(row.location.heads, reader.attention_heads, 0) for row in rows])
    return Knockout(torch.stack(blocked), torch.stack(layers), heads)


def _membership(numbers: Sequence[int] | None, count: int, first: int) -> Tensor:
    """Return bool[count], True at `numbers`, which count from `first`; all True for None."""
    return torch.tensor([numbers is None or number in numbers for number in range(first, first + count)])


def attention_shares(
    case: ConfusionCase, attention: Tensor, itself: Tensor, visible: Tensor, others: Tensor
) -> dict[str, Tensor]:
    """Return the attention of mistaken patches by group f[L, 5], and the shares expected if it were uniform f[5].

    Takes their `attention` f[L, T] and f[L], see attention.py, and what they see, see `PatchReader.visible`.
    """
    correct, incorrect = case.blocked["correct"] & ~case.mistaken, case.blocked["incorrect"] | case.mistaken
    keys = visible[case.mistaken].float()
    uniform = 1 / (keys.sum(1) + others[case.mistaken])  # share of each visible token, the patch itself included
    return {
        "attention": sum_by_group(attention, itself, correct, incorrect),
        "uniform": sum_by_group((keys * uniform[:, None]).mean(0)[None], uniform.mean()[None], correct, incorrect)[0],
    }
