"""Compare drop-off and recovery at every strength of regularisation, from the solved runs of a study.

At each strength, all sites have the probes of that strength, so that no effect depends on how strengths were chosen.
The intervals of an effect hold at all strengths together: where its whole curve lies above zero, the effect holds for
all these probes, not only for the best one of many. The closed form and the optimum of the loss ("instruments") are
judged apart. At the optimum, a strength counts only if the certificates of all sites that the effect reads have
converged.

Effects are in mIoU and in cross-entropy in nats per pixel. The latter is signed like mIoU: positive if the loss is
lower at the first site of the effect. Both read the best layer chosen by mIoU, by cross-validation over images
(`effects.py`).

Shapes: B resamplings, R strengths, S sites, N images, M = 3 sites of the effects.
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
from probes.results.probe_run import ProbeRun

from .effects import BEST_LAYER, Estimate, effects_of_sites, miou_estimates, read_sites, sites_of_effects, subtract
from .study import Rows, Study

INSTRUMENTS = ("closed_form", "optimum")
EFFECTS = {"adapter_drop": (ENCODER, ADAPTER), "recovery": (BEST_LAYER, ADAPTER)}  # the sites that each reads
KEYS = ("image_attention", "instrument", "effect", "measure")
EVERYWHERE, SOMEWHERE, NOWHERE = "at every strength", "at some strengths", "at none"

Effects = dict[tuple[str, str], Estimate]  # by effect and measure


class StrengthEffects(NamedTuple):
    """The effects at one strength, and by effect whether the probes of its sites have converged."""

    effects: Effects
    converged: dict[str, bool]


def path_verdicts(study: Study) -> list[dict[str, Any]]:
    """Return the entry "path" of results.json: per mask, instrument, effect and measure, where the effect holds.

    Each has "verdict": "at every strength", "at some strengths" or "at none"; the strengths where it "holds" and those
    "not_converged", which do not count; and "estimates": for each strength {"strength", "value", "low", "high",
    "holds", "converged"}.
    """
    key = lambda row: tuple(row[name] for name in KEYS)
    return [_verdict(dict(zip(KEYS, of, strict=True)), list(rows)) for of, rows in groupby(path_rows(study), key)]


def _verdict(key: dict[str, str], rows: Rows) -> dict[str, Any]:
    holds = [row["strength"] for row in rows if row["holds"]]
    estimates = [{name: x for name, x in row.items() if name not in KEYS} for row in rows]
    return key | {
        "verdict": EVERYWHERE if len(holds) == len(rows) else SOMEWHERE if holds else NOWHERE,
        "holds": holds,
        "not_converged": [row["strength"] for row in rows if not row["converged"]],
        "estimates": estimates,
    }


def verdict_rows(verdicts: list[dict[str, Any]]) -> Rows:
    """Return the table of :func:`path_rows` from verdicts."""
    return [{key: verdict[key] for key in KEYS} | row for verdict in verdicts for row in verdict["estimates"]]


def path_rows(study: Study) -> Rows:
    """Return one row per mask, instrument, effect, measure and strength: value, simultaneous interval, verdict."""
    return [
        {"image_attention": mask, "instrument": instrument} | row
        for mask, run in study.solved.items()
        for instrument in INSTRUMENTS
        if run.metrics["path"].get(instrument)
        for row in _instrument_rows(run, study.solved_untrained.get(mask), instrument)
    ]


def _instrument_rows(run: ProbeRun, control: ProbeRun | None, instrument: str) -> Iterator[dict[str, Any]]:
    by_strength = effects_by_strength(run, instrument, run.weights)
    if control and control.metrics["path"].get(instrument):
        _add_control(by_strength, effects_by_strength(control, instrument, run.weights))
    for effect, measure in dict.fromkeys(key for entry in by_strength.values() for key in entry.effects):
        entries = {r: entry for r, entry in by_strength.items() if (effect, measure) in entry.effects}
        values, resampled = zip(*(entry.effects[effect, measure] for entry in entries.values()), strict=True)
        values = torch.tensor(values, dtype=torch.float64)
        band = torch.stack([values, *simultaneous_band(values, torch.stack(resampled, 1))], 1)
        for (strength, entry), (value, low, high) in zip(entries.items(), band.tolist(), strict=True):
            converged = entry.converged[effect]
            row = {"effect": effect, "measure": measure, "strength": strength}
            row |= {"value": value, "low": low, "high": high}
            yield row | {"holds": low > 0 and converged, "converged": converged}


def _add_control(trained: dict[float, StrengthEffects], untrained: dict[float, StrengthEffects]) -> None:
    """Add "recovery_trained", recovery minus that of the untrained model, at the strengths that both have."""
    for strength in trained.keys() & untrained.keys():
        (effects, converged), control = trained[strength], untrained[strength]
        for measure in ("miou", "cross_entropy"):
            if ("recovery", measure) in effects and ("recovery", measure) in control.effects:
                pair = (entry["recovery", measure] for entry in (effects, control.effects))
                effects["recovery_trained", measure] = subtract(*pair)
                converged["recovery_trained"] = converged["recovery"] and control.converged["recovery"]


def effects_by_strength(run: ProbeRun, instrument: str, weights: Tensor) -> dict[float, StrengthEffects]:
    """Return drop-off and recovery of a solved run at each strength, for bootstrap weights f[B, N]."""
    strengths = run.metrics["path"][instrument]["strengths"]
    return {
        strength: _effects_at(run, instrument, i, *counts, weights)
        for i, (strength, counts) in enumerate(zip(strengths, run.path_counts(instrument), strict=True))
    }


def _effects_at(
    run: ProbeRun, instrument: str, strength: int, counts: Counts, loss: Tensor, weights: Tensor
) -> StrengthEffects:
    site_of_image = sites_of_effects(run.sites, counts, run.groups)
    if not site_of_image:
        return StrengthEffects({}, {})
    scores = {
        "miou": miou_estimates(counts, site_of_image, weights),
        "cross_entropy": loss_estimates(counts, loss, site_of_image, weights),
    }
    effects = {
        (effect, measure): estimate
        for measure, estimates in scores.items()
        for effect, estimate in effects_of_sites(estimates).items()
    }
    sites = lambda effect: torch.cat([site_of_image[name].unique() for name in EFFECTS[effect]]).tolist()
    return StrengthEffects(
        effects, {effect: has_converged(run, instrument, strength, sites(effect)) for effect, _ in effects}
    )


def loss_estimates(
    counts: Counts, loss: Tensor, site_of_image: dict[str, Tensor], weights: Tensor
) -> dict[str, Estimate]:
    """Return minus the cross-entropy per pixel at encoder, adapter and best layer, from summed losses f64[S, N]."""
    loss, pixels, weights = read_sites(loss.double(), site_of_image), counts.labelled.sum(1).double(), weights.double()
    values, resampled = -loss.sum(1) / pixels.sum(), -(weights @ loss.T) / (weights @ pixels)[:, None]
    return {site: (values[i].item(), resampled[:, i]) for i, site in enumerate(site_of_image)}


def has_converged(run: FinishedRun, instrument: str, strength: int, sites: list[int]) -> bool:
    """Return whether the probes of all these sites have converged; those of the closed form need not."""
    if instrument == "closed_form":
        return True
    entries = {entry["site"]: entry.get("certificates") or [] for entry in run.metrics["path"][instrument]["sites"]}
    certificates = [entries.get(run.sites[site], [])[strength : strength + 1] for site in sites]
    return all(found and found[0].get("converged") for found in certificates)
