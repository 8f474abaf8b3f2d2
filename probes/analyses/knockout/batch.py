"""Knock out one batch of images: all cases and conditions share forwards, and the layers before the cut.

Shapes: B images, C cases, T patches, L layers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probes.evaluation.true_classes import true_classes
from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER

from . import KnockoutOptions
from .attention import attention_from
from .cases import ConfusionCase, PatchReader, find_cases
from .conditions import MatchingFeatures, blocked_by_condition
from .rates import outcome_key
from .schema import CASE_KEYS


class ForwardRow(NamedTuple):
    """One row of a forward: which tokens of a case are blocked."""

    case: int  # index of the case
    condition: str
    blocked: Tensor  # bool[T]


def knock_out_batch(
    reader: PatchReader,
    plan: KnockoutOptions,
    classes: list[str],
    batch: dict,
) -> dict[str, Tensor]:
    """Return the results of a batch, collated by data/batches.py, by "class/key", one row per case.

    `classes` are the names of all classes. Without cases the result is empty.
    """
    pixels = batch["pixels"]
    mllm = reader.mllm
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
    del states  # of every layer; the forwards under a knockout need the memory
    attention: Sequence[Tensor | None] = [None] * len(cases)
    if "matched" in plan.controls:
        attention = attention_from(mllm, pixels, [(case.row, case.mistaken) for case in cases])
    results: list[dict[str, Tensor]] = []
    rows: list[ForwardRow] = []
    for i, case in enumerate(cases):
        features = MatchingFeatures.from_case(case, mllm.grid, adapter[case.row], attention[i])
        for condition, draws in blocked_by_condition(case, features, plan).items():
            rows += [ForwardRow(i, condition, draw) for draw in draws]
        result = {key: torch.tensor(getattr(case, key)) for key in CASE_KEYS}
        unmodified = case.outcomes(predicted[:, case.row])
        results.append(
            result | {outcome_key(name, "none"): values for name, values in unmodified.items()}
        )
    for (i, condition), outcomes in _run_rows(reader, pixels, cases, rows, plan).items():
        results[i] |= {
            outcome_key(name, condition): values.mean(0) for name, values in outcomes.items()
        }
    tensors: dict[str, list[Tensor]] = {}
    for case, result in zip(cases, results, strict=True):
        for key, value in result.items():
            tensors.setdefault(f"{classes[case.wrong_class]}/{key}", []).append(value)
    return {key: torch.stack(values) for key, values in tensors.items()}


def _run_rows(
    reader: PatchReader,
    pixels: Tensor,
    cases: list[ConfusionCase],
    rows: list[ForwardRow],
    plan: KnockoutOptions,
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Return the outcomes by case and condition, f[draws, L + 1] each; identical rows run once."""
    identities = [(row.case, row.blocked.numpy().tobytes()) for row in rows]
    distinct = list(dict(zip(identities, rows, strict=True)).items())
    measured: dict[tuple, dict[str, Tensor]] = {}
    for start in range(0, len(distinct), plan.batch_size):
        chunk = distinct[start : start + plan.batch_size]
        of_rows = [cases[row.case] for _, row in chunk]
        knockout = Knockout(torch.stack([row.blocked for _, row in chunk]), plan.layers)
        images = sorted({case.row for case in of_rows})
        row_images = [images.index(case.row) for case in of_rows]
        predicted = reader.predict_states(
            reader.mllm.states(pixels[images], reader.layers, knockout, row_images)
        )
        for i, (identity, _) in enumerate(chunk):
            measured[identity] = of_rows[i].outcomes(predicted[:, i])
    draws: dict[tuple[int, str], list[dict[str, Tensor]]] = {}
    for identity, row in zip(identities, rows, strict=True):
        draws.setdefault((row.case, row.condition), []).append(measured[identity])
    return {
        key: {name: torch.stack([draw[name] for draw in of_key]) for name in of_key[0]}
        for key, of_key in draws.items()
    }
