"""Knock out one batch of images: all cases, conditions and cut locations share forwards, and layers until they differ.

Shapes: B images, C cases, T patches, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.evaluation.true_classes import true_classes
from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER

from . import Options
from .attention import attention_from
from .cases import ConfusionCase, PatchReader, find_cases
from .conditions import MatchingFeatures, blocked_by_condition, measure_balance
from .effects import outcome_key
from .layer_sweep import SWEEP_CONDITIONS, cut_locations
from .schema import CASE_KEYS


class ForwardRow(NamedTuple):
    """One row of a forward: which tokens of a case are blocked, and where."""

    case: int  # index of the case
    key: str  # key of the result
    blocked: Tensor  # bool[T]
    layers: Sequence[int]  # to cut, numbered from 1


def knock_out_batch(
    reader: PatchReader,
    plan: Options,
    classes: list[str],
    batch: dict,
) -> dict[str, Tensor]:
    """Return the results of a batch, collated by data/batches.py, by "class/key", one row per case.

    `classes` are the names of all classes. Without cases the result is empty.
    """
    pixels = batch["pixels"]
    mllm = reader.mllm
    depth = len(reader.layers) - 1
    states = mllm.states(pixels, reader.layers)
    predicted = reader.predict_states(states)
    truth = true_classes(batch["target"], len(classes), mllm)
    how = (reader.layers.index(plan.block_by), plan.min_patches)
    cases: list[ConfusionCase] = []
    for name in plan.classes:
        cases += find_cases(
            predicted,
            truth,
            batch["index"],
            classes.index(name),
            *how,
        )
    if not cases:
        return {}
    adapter = states[ADAPTER]
    visible = reader.visible()
    del states  # of every layer; the forwards under a knockout need the memory
    attention = None
    if "matched" in plan.controls:
        attention = attention_from(mllm, pixels, [(case.row, case.mistaken) for case in cases])
    results: list[dict[str, Tensor]] = []
    rows: list[ForwardRow] = []
    for i, case in enumerate(cases):
        mass = None if attention is None else attention[i].mean(0)
        features = MatchingFeatures.from_case(
            case,
            mllm.grid,
            visible,
            adapter[case.row],
            mass,
        )
        blocked = blocked_by_condition(case, features, plan)
        results.append(describe_case(case, predicted[:, case.row], features, blocked))
        rows += plan_rows(i, blocked, plan, depth)
    for (i, key), outcomes in _run_rows(reader, pixels, cases, rows, plan).items():
        if key.startswith("swept:"):
            results[i][key] = outcomes["rate"]
        else:
            results[i] |= {
                outcome_key(name, key): values.mean(0) for name, values in outcomes.items()
            }
    tensors: dict[str, list[Tensor]] = {}
    for case, result in zip(cases, results, strict=True):
        for key, value in result.items():
            tensors.setdefault(f"{classes[case.wrong_class]}/{key}", []).append(value)
    return {key: torch.stack(values) for key, values in tensors.items()}


def describe_case(
    case: ConfusionCase,
    predicted: Tensor,
    features: MatchingFeatures,
    blocked: dict[str, list[Tensor]],
) -> dict[str, Tensor]:
    """Return what is known of a case without a forward: itself, its outcomes unmodified, and how its controls match.

    Args:
        case: The case.
        predicted: Classes of its image at each layer, i64[L + 1, T].
        features: What controls are matched in.
        blocked: Tokens bool[T] of each draw, by condition.
    """
    result = {key: torch.tensor(getattr(case, key)) for key in CASE_KEYS}
    unmodified = case.outcomes(predicted)
    result |= {outcome_key(name, "none"): values for name, values in unmodified.items()}
    for key, draws in blocked.items():
        result[f"balance:{key}"] = measure_balance(case, features, key, draws)
    return result


def plan_rows(
    number: int,
    blocked: dict[str, list[Tensor]],
    plan: Options,
    depth: int,
) -> list[ForwardRow]:
    """Return the rows of case `number`: each draw of each condition, then the sweep over windows of `depth` layers."""
    layers = plan.layers or range(1, depth + 1)
    rows = [
        ForwardRow(number, key, draw, layers) for key, draws in blocked.items() for draw in draws
    ]
    locations = cut_locations(plan.layer_windows, depth)
    for key in SWEEP_CONDITIONS:
        for at in locations:
            rows.append(ForwardRow(number, f"swept:{key}", blocked[key][0], at.layers))
    return rows


def _run_rows(
    reader: PatchReader,
    pixels: Tensor,
    cases: list[ConfusionCase],
    rows: list[ForwardRow],
    plan: Options,
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Return the outcomes by case and key, f[rows of the key, L + 1] each; identical rows run once."""
    identities = [(row.case, row.blocked.numpy().tobytes(), *row.layers) for row in rows]
    distinct = list(dict(zip(identities, rows, strict=True)).items())
    measured: dict[tuple, dict[str, Tensor]] = {}
    for start in range(0, len(distinct), plan.batch_size):
        chunk = distinct[start : start + plan.batch_size]
        of_rows = [cases[row.case] for _, row in chunk]
        depths = range(1, len(reader.layers))
        layers = torch.tensor([[layer in row.layers for layer in depths] for _, row in chunk])
        knockout = Knockout(torch.stack([row.blocked for _, row in chunk]), layers)
        images = sorted({case.row for case in of_rows})
        row_images = [images.index(case.row) for case in of_rows]
        predicted = reader.predict_states(
            reader.mllm.states(pixels[images], reader.layers, knockout, row_images)
        )
        for i, (identity, _) in enumerate(chunk):
            measured[identity] = of_rows[i].outcomes(predicted[:, i])
    by_key: dict[tuple[int, str], list[dict[str, Tensor]]] = {}
    for identity, row in zip(identities, rows, strict=True):
        by_key.setdefault((row.case, row.key), []).append(measured[identity])

    def stack(outcomes, name):
        return torch.stack([values[name] for values in outcomes])

    return {
        key: {name: stack(outcomes, name) for name in outcomes[0]}
        for key, outcomes in by_key.items()
    }
