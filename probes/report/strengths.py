"""The effects of layers at the chosen strength of regularisation and at its neighbours.

The strength of each site is chosen by cross-validation. Every effect is computed three times: with the probes of the
chosen strengths, and with those that all sites have one step stronger and one step weaker. The intervals of an effect
hold at all three rows together, so that an effect that holds at each of them does not depend on the choice. A row
counts only if the certificates of all sites that the effect reads have converged.

Shapes: B resamplings, S sites, N images, M sites of the effects.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import simultaneous_band
from probes.evaluation.metrics import Counts
from probes.results.formatting import Rows
from probes.results.probe_run import ProbeRun
from probes.results.study import StudyRuns

from .effects import EFFECTS, Estimate, effects_of_sites, miou_estimates, sites_of_effects, subtract

# steps along the path, which runs from strong to weak
ROWS = {"stronger": -1, "chosen": 0, "weaker": 1}


class RowEffects(NamedTuple):
    """The effects of a row, and by effect whether the probes of its sites have converged."""

    effects: dict[str, Estimate]
    converged: dict[str, bool]


def neighbours(run: ProbeRun) -> dict[str, Tensor]:
    """Return the rows "stronger", "chosen" and "weaker": the index i64[S] into path.safetensors at each site.

    A site whose choice is at the end of its path has no neighbour there and keeps its choice. A row in which all sites
    do is left out.
    """
    paths = run.site_paths
    solved = run.solved_strengths
    chosen = [
        found.index(path["strengths"].index(path["chosen"]))
        for path, found in zip(paths, solved, strict=True)
    ]
    rows = {
        # all sites have as many solved strengths
        name: torch.tensor(chosen).add(step).clamp(0, len(solved[0]) - 1)
        for name, step in ROWS.items()
    }
    return {
        name: row for name, row in rows.items() if name == "chosen" or (row != rows["chosen"]).any()
    }


def has_converged(run: ProbeRun, row: Tensor, sites: list[int]) -> bool:
    """Return whether the probes of a row i64[S] have converged at all these sites."""
    paths = run.site_paths
    solved = run.solved_strengths
    certificates = [
        (paths[site].get("certificates") or {}, solved[site][int(row[site])]) for site in sites
    ]
    return all(
        found and (found[strength] or {}).get("converged") for found, strength in certificates
    )


def sites_at_edge(run: ProbeRun) -> list[str]:
    """Return the sites whose cross-validated loss is lowest at an end of the path, where it may fall further."""
    return [
        path["site"]
        for path in run.site_paths
        if path["lowest"] in (path["strengths"][0], path["strengths"][-1])
    ]


def path_rows(study: StudyRuns) -> Rows:
    """Return one entry per mask, effect and row: value, simultaneous interval, and whether it has converged."""
    return [
        {"image_attention": mask} | row
        for mask, run in study.solved.items()
        for row in _rows_of_run(run, study.solved_untrained.get(mask))
    ]


def _rows_of_run(run: ProbeRun, control: ProbeRun | None) -> Iterator[dict[str, Any]]:
    by_row = effects_by_row(run, run.weights)
    if control:
        _add_control(by_row, effects_by_row(control, run.weights))
    for effect in dict.fromkeys(name for entry in by_row.values() for name in entry.effects):
        entries = {name: entry for name, entry in by_row.items() if effect in entry.effects}
        values, resampled = zip(*(entry.effects[effect] for entry in entries.values()), strict=True)
        values = torch.tensor(values, dtype=torch.float64)
        band = torch.stack([values, *simultaneous_band(values, torch.stack(resampled, 1))], 1)
        for (name, entry), (value, low, high) in zip(entries.items(), band.tolist(), strict=True):
            row = {"effect": effect, "row": name, "value": value, "low": low, "high": high}
            yield row | {"converged": entry.converged[effect]}


def _add_control(trained: dict[str, RowEffects], untrained: dict[str, RowEffects]) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, at the rows that both have."""
    for name in trained.keys() & untrained.keys():
        (effects, converged), control = trained[name], untrained[name]
        if "recovery" in effects and "recovery" in control.effects:
            effects["recovery_trained"] = subtract(effects["recovery"], control.effects["recovery"])
            converged["recovery_trained"] = converged["recovery"] and control.converged["recovery"]


def effects_by_row(run: ProbeRun, weights: Tensor) -> dict[str, RowEffects]:
    """Return drop-off and recovery of a solved run at the rows of :func:`neighbours`, for bootstrap weights f[B, N]."""
    path = run.path_counts()
    return {name: _effects_at(run, row, path, weights) for name, row in neighbours(run).items()}


def _effects_at(run: ProbeRun, row: Tensor, path: list[Counts], weights: Tensor) -> RowEffects:
    def pick(name):
        return torch.stack([getattr(path[r], name)[site] for site, r in enumerate(row.tolist())])

    counts = path[0]._replace(intersection=pick("intersection"), predicted=pick("predicted"))
    site_of_image = sites_of_effects(run.sites, counts, run.groups)
    if not site_of_image:
        return RowEffects({}, {})
    effects = effects_of_sites(miou_estimates(counts, site_of_image, weights))

    def sites(effect):
        return torch.cat([site_of_image[name].unique() for name in EFFECTS[effect]]).tolist()

    return RowEffects(
        effects, {effect: has_converged(run, row, sites(effect)) for effect in effects}
    )
