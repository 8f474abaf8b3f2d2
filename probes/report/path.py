"""Compare drop-off and recovery at the chosen strength of regularisation and at its neighbours.

The strength of each site is chosen by cross-validation. Every effect is computed three times: with the probes of the
chosen strengths, and with those that all sites have one step stronger and one step weaker. The intervals of an effect
hold at all three rows together, so that an effect that holds at each of them does not depend on the choice. A row
counts only if the certificates of all sites that the effect reads have converged.

Effects are in mIoU and in cross-entropy in nats per pixel. The latter is signed like mIoU: positive if the loss is
lower at the first site of the effect. Both read the best layer chosen by mIoU, by cross-validation over images
(`effects.py`).

Shapes: B resamplings, S sites, N images, M = 3 sites of the effects.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import simultaneous_band
from probes.evaluation.metrics import Counts
from probes.models.sites import ADAPTER, ENCODER
from probes.results.finished_run import FinishedRun
from probes.results.formatting import Rows
from probes.results.probe_run import ProbeRun
from probes.results.study import Study

from .effects import BEST_LAYER, Estimate, effects_of_sites, miou_estimates, read_sites, sites_of_effects, subtract

ROWS = {"stronger": -1, "chosen": 0, "weaker": 1}  # steps along the path, which runs from strong to weak
EFFECTS = {"adapter_drop": (ENCODER, ADAPTER), "recovery": (BEST_LAYER, ADAPTER)}  # the sites that each reads
KEYS = ("image_attention", "effect", "measure")
EVERYWHERE, SOMEWHERE, NOWHERE = "at all strengths", "at some strengths", "at none"

Effects = dict[tuple[str, str], Estimate]  # by effect and measure


class RowEffects(NamedTuple):
    """The effects of a row, and by effect whether the probes of its sites have converged."""

    effects: Effects
    converged: dict[str, bool]


def neighbours(run: FinishedRun) -> dict[str, Tensor]:
    """Return the rows "stronger", "chosen" and "weaker": the index i64[S] into path.safetensors at each site.

    A site whose choice is at the end of its path has no neighbour there and keeps its choice. A row in which all sites
    do is left out.
    """
    paths, solved = run.site_paths, run.solved_strengths
    chosen = [found.index(path["strengths"].index(path["chosen"])) for path, found in zip(paths, solved, strict=True)]
    rows = {
        name: torch.tensor(chosen).add(step).clamp(0, len(solved[0]) - 1)  # all sites have as many solved strengths
        for name, step in ROWS.items()
    }
    return {name: row for name, row in rows.items() if name == "chosen" or (row != rows["chosen"]).any()}


def has_converged(run: FinishedRun, row: Tensor, sites: list[int]) -> bool:
    """Return whether the probes of a row i64[S] have converged at all these sites; least squares always have."""
    if run.instrument == "closed_form":
        return True
    paths, solved = run.site_paths, run.solved_strengths
    certificates = [(paths[site].get("certificates") or {}, solved[site][int(row[site])]) for site in sites]
    return all(found and (found[strength] or {}).get("converged") for found, strength in certificates)


def sites_at_edge(run: FinishedRun) -> list[str]:
    """Return the sites whose cross-validated loss is lowest at an end of the path, where it may fall further."""
    return [path["site"] for path in run.site_paths if path["lowest"] in (path["strengths"][0], path["strengths"][-1])]


def path_verdicts(study: Study) -> list[dict[str, Any]]:
    """Return the entry "path" of results.json: per mask, effect and measure, at which rows the effect holds.

    Each has "verdict": "at all strengths", "at some strengths" or "at none"; the rows where it "holds" and those
    "not_converged", which do not count; and "estimates": for each row {"row", "value", "low", "high", "holds",
    "converged"}.
    """
    key = lambda row: tuple(row[name] for name in KEYS)
    return [_verdict(dict(zip(KEYS, of, strict=True)), list(rows)) for of, rows in groupby(path_rows(study), key)]


def _verdict(key: dict[str, str], rows: Rows) -> dict[str, Any]:
    holds = [row["row"] for row in rows if row["holds"]]
    estimates = [{name: x for name, x in row.items() if name not in KEYS} for row in rows]
    return key | {
        "verdict": EVERYWHERE if len(holds) == len(rows) else SOMEWHERE if holds else NOWHERE,
        "holds": holds,
        "not_converged": [row["row"] for row in rows if not row["converged"]],
        "estimates": estimates,
    }


def verdict_rows(verdicts: list[dict[str, Any]]) -> Rows:
    """Return the table of :func:`path_rows` from verdicts."""
    return [{key: verdict[key] for key in KEYS} | row for verdict in verdicts for row in verdict["estimates"]]


def path_rows(study: Study) -> Rows:
    """Return one entry per mask, effect, measure and row: value, simultaneous interval, verdict."""
    return [
        {"image_attention": mask} | row
        for mask, run in study.solved.items()
        for row in _rows_of_run(run, study.solved_untrained.get(mask))
    ]


def _rows_of_run(run: ProbeRun, control: ProbeRun | None) -> Iterator[dict[str, Any]]:
    by_row = effects_by_row(run, run.weights)
    if control:
        _add_control(by_row, effects_by_row(control, run.weights))
    for effect, measure in dict.fromkeys(key for entry in by_row.values() for key in entry.effects):
        entries = {name: entry for name, entry in by_row.items() if (effect, measure) in entry.effects}
        values, resampled = zip(*(entry.effects[effect, measure] for entry in entries.values()), strict=True)
        values = torch.tensor(values, dtype=torch.float64)
        band = torch.stack([values, *simultaneous_band(values, torch.stack(resampled, 1))], 1)
        for (name, entry), (value, low, high) in zip(entries.items(), band.tolist(), strict=True):
            converged = entry.converged[effect]
            row = {"effect": effect, "measure": measure, "row": name, "value": value, "low": low, "high": high}
            yield row | {"holds": low > 0 and converged, "converged": converged}


def _add_control(trained: dict[str, RowEffects], untrained: dict[str, RowEffects]) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, at the rows that both have."""
    for name in trained.keys() & untrained.keys():
        (effects, converged), control = trained[name], untrained[name]
        for measure in ("miou", "cross_entropy"):
            if ("recovery", measure) in effects and ("recovery", measure) in control.effects:
                pair = (entry["recovery", measure] for entry in (effects, control.effects))
                effects["recovery_trained", measure] = subtract(*pair)
                converged["recovery_trained"] = converged["recovery"] and control.converged["recovery"]


def effects_by_row(run: ProbeRun, weights: Tensor) -> dict[str, RowEffects]:
    """Return drop-off and recovery of a solved run at the rows of :func:`neighbours`, for bootstrap weights f[B, N]."""
    path = run.path_counts()
    return {name: _effects_at(run, row, path, weights) for name, row in neighbours(run).items()}


def _effects_at(run: ProbeRun, row: Tensor, path: list[tuple[Counts, Tensor]], weights: Tensor) -> RowEffects:
    pick = lambda read: torch.stack([read(*path[r])[site] for site, r in enumerate(row.tolist())])
    right, predicted = pick(lambda counts, _: counts.intersection), pick(lambda counts, _: counts.predicted)
    counts = path[0][0]._replace(intersection=right, predicted=predicted, patch_right=right.sum(-1, keepdim=True))
    site_of_image = sites_of_effects(run.sites, counts, run.groups)
    if not site_of_image:
        return RowEffects({}, {})
    scores = {
        "miou": miou_estimates(counts, site_of_image, weights),
        "cross_entropy": loss_estimates(counts, pick(lambda _, loss: loss), site_of_image, weights),
    }
    effects = {
        (effect, measure): estimate
        for measure, estimates in scores.items()
        for effect, estimate in effects_of_sites(estimates).items()
    }
    sites = lambda effect: torch.cat([site_of_image[name].unique() for name in EFFECTS[effect]]).tolist()
    return RowEffects(effects, {effect: has_converged(run, row, sites(effect)) for effect, _ in effects})


def loss_estimates(
    counts: Counts, loss: Tensor, site_of_image: dict[str, Tensor], weights: Tensor
) -> dict[str, Estimate]:
    """Return minus the cross-entropy per pixel at encoder, adapter and best layer, from summed losses f64[S, N]."""
    loss, pixels, weights = read_sites(loss.double(), site_of_image), counts.labelled.sum(1).double(), weights.double()
    values, resampled = -loss.sum(1) / pixels.sum(), -(weights @ loss.T) / (weights @ pixels)[:, None]
    return {site: (values[i].item(), resampled[:, i]) for i, site in enumerate(site_of_image)}
