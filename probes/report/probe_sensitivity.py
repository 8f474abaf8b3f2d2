"""Check whether drop-off and recovery survive other ways of training the probes.

With AdamW at one learning rate and unnormalised states, a probe's score depends on the scale of its features. This
scale differs by orders of magnitude between layers, so part of a curve may reflect optimisation instead of
information. The same states are therefore probed with several norms, learning rates, heads, seeds, and with shuffled
labels. Each such setting is a probe variant, stored under "recipes" in metrics.json.
"""

from dataclasses import dataclass
from typing import Any

import torch

from probes.evaluation.bootstrap import dataset_scores
from probes.evaluation.metrics import Counts, peak_layer
from probes.results.probe_run import ProbeRun

from .effects import drop_and_recovery, estimates_to_json

EFFECTS = {"adapter_drop": "drop-off", "recovery": "recovery"}
SETTINGS = ("head", "feature_norm", "learning_rate", "labels", "seed")
DEFAULTS = {"head": "linear", "labels": "true"}  # for runs whose metrics.json lacks these keys


@dataclass
class VariantScores:
    """Scores of one probe variant."""

    name: str | None  # None for the main one
    settings: dict[str, Any]  # values of SETTINGS
    entries: list[dict[str, Any]]  # one entry per site, as in metrics.json

    @property
    def miou(self) -> dict[str, float]:
        """Mean IoU per site."""
        return {entry["site"]: entry["miou"] for entry in self.entries}

    def label(self, *keys: str) -> str:
        """Return a label that tells the variant from others that differ in the settings `keys`."""
        words = {"learning_rate": "lr {}", "seed": "seed {}", "labels": "{} labels", "feature_norm": "norm {}"}
        return ", ".join(words.get(key, "{}").format(self.settings[key]) for key in keys)


def read_variants(run: ProbeRun) -> list[VariantScores]:
    """Return all probe variants of a run, the main one first."""
    metrics = {None: run.metrics} | run.metrics.get("recipes", {})
    defaults = DEFAULTS | {"seed": run.metrics["seed"]}
    return [
        VariantScores(name, {key: (defaults | scores["probe"])[key] for key in SETTINGS}, scores["sites"])
        for name, scores in metrics.items()
    ]


def select_variants(run: ProbeRun, *keys: str) -> list[VariantScores]:
    """Return the main variant and those that differ from it only in the settings `keys`."""
    main, *others = read_variants(run)
    fixed = [key for key in SETTINGS if key not in keys]
    return [main, *(v for v in others if all(v.settings[key] == main.settings[key] for key in fixed))]


def one_per_value(variants: list[VariantScores], key: str) -> list[VariantScores]:
    """Return the first variant for each value of the setting `key`; empty if there is only one value."""
    by_value: dict[Any, VariantScores] = {}
    for variant in variants:
        by_value.setdefault(variant.settings[key], variant)
    return list(by_value.values()) if len(by_value) > 1 else []


def scale_sensitivity(run: ProbeRun) -> dict[str, Any] | None:
    """Return the entry "scale" of results.json: both effects under each norm and learning rate, and a verdict.

    Returns:
        None if neither setting was varied. Otherwise "recipes" has one entry per probe variant. "ways" has one entry
        per norm, with the best learning rate chosen per site, which removes the influence of the rate; or one entry
        per learning rate if only the rate was varied. Both contain "adapter_drop" and "recovery" as {"value", "ci95",
        "holds"}. "verdict" has one text per effect.
    """
    variants = select_variants(run, "feature_norm", "learning_rate")
    if len(variants) == 1:
        return None
    entries = [
        {"recipe": variant.name or "main"}
        | {key: variant.settings[key] for key in ("feature_norm", "learning_rate")}
        | {"peak_site": peak_layer(variant.miou)}
        | _effects_json(run, run.counts_of(variant.name))
        for variant in variants
    ]
    by_variant = {v.label("feature_norm", "learning_rate"): e for v, e in zip(variants, entries, strict=True)}
    ways, kind = _effects_by_norm(run, variants), "norms, each site at its best learning rate"
    if len(ways) == len(variants):
        kind = "norms"
    elif len(ways) == 1:
        ways, kind = by_variant, "learning rates"
    verdicts = {}
    for key, name in EFFECTS.items():
        effect_by_way = {way: entry[key] for way, entry in ways.items() if key in entry}
        if effect_by_way:
            verdicts[key] = effect_verdict(name, kind, effect_by_way)
            if len(by_variant) > len(effect_by_way):
                verdicts[key] += _verdict_by_variant({label: entry[key] for label, entry in by_variant.items()})
    ways = [{"way": way} | {key: entry[key] for key in EFFECTS if key in entry} for way, entry in ways.items()]
    return {"recipes": entries, "ways": ways, "verdict": verdicts}


def _effects_json(run: ProbeRun, counts: Counts) -> dict[str, Any]:
    effects = drop_and_recovery(run.sites, counts, run.weights, run.groups)
    return {name: entry | {"holds": entry["ci95"][0] > 0} for name, entry in estimates_to_json(effects).items()}


def _effects_by_norm(run: ProbeRun, variants: list[VariantScores]) -> dict[str, dict[str, Any]]:
    """Return the effects per norm, each site scored at its best learning rate."""
    effects = {}
    for norm in dict.fromkeys(variant.settings["feature_norm"] for variant in variants):
        counts = [run.counts_of(v.name) for v in variants if v.settings["feature_norm"] == norm]
        best = torch.stack([dataset_scores(c).miou for c in counts]).argmax(0).tolist()
        pick = lambda field: torch.stack([getattr(counts[b], field)[site] for site, b in enumerate(best)])  # noqa: B023
        tuned = counts[0]._replace(intersection=pick("intersection"), predicted=pick("predicted"))
        effects[norm] = _effects_json(run, tuned)
    return effects


def effect_verdict(effect: str, kind: str, ways: dict[str, dict[str, Any]]) -> str:
    """Return a text: in how many ways of probing an effect holds, in which it does not, and the conclusion.

    `kind` names what differs between the ways: "norms" or "learning rates". Each way has {"value", "ci95", "holds"}.
    """
    holding = sum(estimate["holds"] for estimate in ways.values())
    text = f"The {effect} holds under {holding} of {len(ways)} {kind}"
    if holding == len(ways):
        sizes = ", ".join(f"{way} {100 * estimate['value']:+.1f}" for way, estimate in ways.items()).replace("-", "−")
        return f"{text} ({sizes} pp): the effect does not depend on the scale of the features."
    failing = _list_failing(ways)
    if holding:
        return f"{text}, not under {failing}: the effect depends on the scale of the features."
    return f"{text}: {failing}. The effect is not supported."


def _verdict_by_variant(effects: dict[str, dict[str, Any]]) -> str:
    """Return a text on the effect without tuning: a learning rate that suits one site may not suit another."""
    holding = sum(estimate["holds"] for estimate in effects.values())
    text = f" Without tuning the learning rate per site, it holds under {holding} of {len(effects)} probe variants"
    return f"{text}." if holding == len(effects) else f"{text}, not under {_list_failing(effects)}."


def _list_failing(effects: dict[str, dict[str, Any]]) -> str:
    return "; ".join(f"{name} ({_format_effect(e)})" for name, e in effects.items() if not e["holds"])


def _format_effect(estimate: dict[str, Any]) -> str:
    low, high = estimate["ci95"]
    sign = "reversed" if high < 0 else "not significant"
    return f"{sign}, {100 * estimate['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def seed_spread(run: ProbeRun) -> list[dict[str, Any]]:
    """Return the spread over probe seeds per site and effect; empty if there is only one seed.

    Each entry: {"of", "seeds", "mean", "sd", "lowest", "highest", "ci95"}; "ci95" is the main seed's, over images.
    """
    variants = select_variants(run, "seed")
    if len(variants) == 1:
        return []
    values = {site: [variant.miou[site] for variant in variants] for site in run.sites}
    ci95 = {entry["site"]: entry["miou_ci95"] for entry in run.metrics["sites"]}
    effects = [_effects_json(run, run.counts_of(variant.name)) for variant in variants]
    for name in effects[0]:
        values[name] = [of_seed[name]["value"] for of_seed in effects]
        ci95[name] = effects[0][name]["ci95"]
    return [
        {"of": name, "seeds": len(variants), "mean": sum(x) / len(x)}
        | {"sd": torch.tensor(x, dtype=torch.float64).std().item()}
        | {"lowest": min(x), "highest": max(x), "ci95": ci95[name]}
        for name, x in values.items()
    ]
