"""Knock out one batch of images: all cases and conditions share forwards, and the layers before the cut.

Shapes: B images, C cases, T patches, L layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from probes.models.knockout import Knockout
from probes.models.sites import ADAPTER
from probes.score.true_classes import true_classes

from . import KnockoutOptions
from .cases import ConfusionCase, PatchReader, find_cases
from .conditions import blocked_by_condition, high_norm_tokens
from .rates import outcome_key
from .schema import CASE_KEYS

Outcomes = dict[str, Tensor]  # f[L + 1] by name, see cases.py


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
    rows: list[ForwardRow] = []
    for i, case in enumerate(cases):
        high_norm = high_norm_tokens(adapter[case.row])
        for condition, draws in blocked_by_condition(case, high_norm, plan).items():
            rows += [ForwardRow(i, condition, draw) for draw in draws]
    measured = _run_rows(reader, pixels, cases, rows, plan)
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


def _run_rows(
    reader: PatchReader,
    pixels: Tensor,
    cases: list[ConfusionCase],
    rows: list[ForwardRow],
    plan: KnockoutOptions,
) -> list[dict[str, list[Outcomes]]]:
    """Return the outcomes of each draw by case and condition; identical rows run once."""
    distinct = {row.identity: row for row in rows}
    measured: dict[tuple[int, bytes], Outcomes] = {}
    for start in range(0, len(distinct), plan.batch_size):
        chunk = list(distinct.values())[start : start + plan.batch_size]
        blocked = torch.stack([row.blocked for row in chunk])
        in_batch = [cases[row.case].row for row in chunk]
        images = sorted(set(in_batch))
        states = reader.mllm.states(
            pixels[images],
            reader.layers,
            Knockout(blocked, plan.layers),
            rows=[images.index(image) for image in in_batch],
        )
        predicted = reader.predict_states(states)
        for i, row in enumerate(chunk):
            measured[row.identity] = cases[row.case].outcomes(predicted[:, i])
    by_case: list[dict[str, list[Outcomes]]] = [{} for _ in cases]
    for row in rows:
        draws = by_case[row.case].setdefault(row.condition, [])
        draws.append(measured[row.identity])
    return by_case
