"""The effects of layers at the chosen strength of regularisation and at its neighbours.

The strength of each site is chosen by cross-validation. A solved run has every effect three times, "EFFECT@ROW": with
the probes of the chosen strengths, and with those that all sites have one step stronger and one step weaker. The
intervals of an effect hold at all three rows together, so that an effect that holds at each of them does not depend on
the choice. A row counts only if the certificates of all sites that the effect reads have converged.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from llava_bidir.common.bootstrap import simultaneous_band
from probes.runs.finished_run import FinishedRun
from probes.runs.formatting import Entry, Rows
from probes.runs.study import UNTRAINED, StudyRuns, by_mask
from probes.score.estimate import Estimate
from probes.score.layer_effects import EFFECTS
from probes.score.strengths import ROWS


def path_rows(study: StudyRuns) -> Rows:
    """Return one entry per mask, effect and row: value, simultaneous interval, and whether it has converged."""
    untrained = by_mask(study.where(arm=UNTRAINED, solved=True))
    return [
        {
            "image_attention": mask,
            "effect": effect,
        }
        | row
        for mask, run in study.solved.items()
        for effect, by_row in _effects_by_row(run, untrained.get(mask)).items()
        for row in _rows_of_effect(by_row)
    ]


def _effects_by_row(
    run: FinishedRun, control: FinishedRun | None
) -> dict[str, dict[str, Estimate]]:
    """Return the effects of a run by name and row; with a control also "recovery_trained", recovery minus its own."""
    by_effect = {effect: _at_rows(run, effect) for effect in EFFECTS}
    if control:
        own = by_effect["recovery"]
        others = _at_rows(control, "recovery")
        by_effect["recovery_trained"] = {
            row: _minus_control(own[row], others[row]) for row in own if row in others
        }
    return {effect: by_row for effect, by_row in by_effect.items() if by_row}


def _at_rows(run: FinishedRun, effect: str) -> dict[str, Estimate]:
    named = {row: run.effects.get(f"{effect}@{row}") for row in ROWS}
    return {row: estimate for row, estimate in named.items() if estimate}


def _minus_control(own: Estimate, control: Estimate) -> Estimate:
    converged = own.about["converged"] and control.about["converged"]
    return replace(own - control, about={"converged": converged})


def _rows_of_effect(by_row: dict[str, Estimate]) -> Iterator[Entry]:
    estimates = list(by_row.values())
    values = torch.tensor([estimate.value for estimate in estimates], dtype=torch.float64)
    resampled = torch.stack([estimate.resampled for estimate in estimates], 1)
    low, high = simultaneous_band(values, resampled)
    for i, (row, estimate) in enumerate(by_row.items()):
        yield {
            "row": row,
            "value": estimate.value,
            "low": low[i].item(),
            "high": high[i].item(),
            "converged": estimate.about["converged"],
        }


def edge_notes(at_edge: dict[str, list[str]]) -> list[str]:
    """Return which sites have their lowest cross-validated loss at an end of the path of strengths.

    Args:
        at_edge: Names of the sites by mask; the mask is named if there are several.
    """
    notes = []
    for mask, sites in at_edge.items():
        subject = f"Under {mask} attention, the" if len(at_edge) > 1 else "The"
        if sites:
            notes.append(
                f"{subject} cross-validated loss is lowest at an end of the path at "
                f"{', '.join(sites)}: the optimum may be beyond it."
            )
    return notes
