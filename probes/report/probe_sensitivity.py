"""Do drop-off and recovery survive another way of training the probes?

With AdamW at one learning rate and states as they are, a probe's score depends on the scale of its features, which
differs by orders of magnitude over layers: part of a curve may be optimisation instead of information. So the same
states are probed under several norms and learning rates, by richer heads, from several seeds, and on shuffled labels,
and what is concluded follows from the intervals.
"""

from dataclasses import dataclass
from typing import Any

import torch

from probes.evaluation.bootstrap import dataset_scores
from probes.evaluation.metrics import Counts, peak_layer
from probes.results.probe_run import ProbeRun

from .effects import as_json, drop_and_recovery

EFFECTS = {"adapter_drop": "drop-off", "recovery": "recovery"}
DEFAULTS = {"head": "linear", "labels": "true"}  # of runs whose metrics.json does not say


@dataclass
class VariantScores:
    """A way in which probes were trained.

    Args:
        name: None for the main one.
        settings: head, feature_norm, learning_rate, labels, seed.
        entries: One a site, as in metrics.json.
    """

    name: str | None
    settings: dict[str, Any]
    entries: list[dict[str, Any]]

    @property
    def miou(self) -> dict[str, float]:
        return {entry["site"]: entry["miou"] for entry in self.entries}

    def label(self, *keys: str) -> str:
        """What it is called beside others that differ from it in `keys`."""
        words = {"learning_rate": "lr {}", "seed": "seed {}", "labels": "{} labels", "feature_norm": "norm {}"}
        return ", ".join(words.get(key, "{}").format(self.settings[key]) for key in keys)


def recipes_of(run: ProbeRun) -> list[VariantScores]:
    """All recipes of a run, the main one first."""
    found = {None: run.metrics} | run.metrics.get("recipes", {})
    defaults = DEFAULTS | {"seed": run.metrics["seed"]}
    keys = ("head", "feature_norm", "learning_rate", "labels", "seed")
    return [
        VariantScores(name, {key: (defaults | facts["probe"])[key] for key in keys}, facts["sites"])
        for name, facts in found.items()
    ]


def alike_but_for(run: ProbeRun, *keys: str) -> list[VariantScores]:
    """The recipes that have everything but `keys` in common with the main one, which is among them."""
    main, *rest = recipes_of(run)
    same = lambda recipe: all(recipe.settings[key] == main.settings[key] for key in main.settings if key not in keys)
    return [main, *filter(same, rest)]


def scale_confound(run: ProbeRun) -> dict[str, Any] | None:
    """What results.json says under "scale": drop-off and recovery under each norm and learning rate, and a verdict.

    Returns:
        "recipes": one entry a recipe. "ways": one a norm, at the learning rate that is best at each site, which takes
        the rate's part in the confound away (one a learning rate, where only that was varied); each with "adapter_drop"
        and "recovery", {"value", "ci95", "holds"}. "verdict": in words, by effect. None where neither was varied.
    """
    recipes = alike_but_for(run, "feature_norm", "learning_rate")
    if len(recipes) == 1:
        return None
    entries = [
        {"recipe": recipe.name or "main"}
        | {key: recipe.settings[key] for key in ("feature_norm", "learning_rate")}
        | {"peak_site": peak_layer(recipe.miou)}
        | _effects(run, run.counts_of(recipe.name))
        for recipe in recipes
    ]
    singles = {recipe.label("feature_norm", "learning_rate"): e for recipe, e in zip(recipes, entries, strict=True)}
    ways, what = _by_norm(run, recipes), "norms, each site at its best learning rate"
    if len(ways) == len(recipes):
        what = "norms"
    elif len(ways) == 1:
        ways, what = singles, "learning rates"
    words = {}
    for key, name in EFFECTS.items():
        found = {way: entry[key] for way, entry in ways.items() if key in entry}
        if found:
            words[key] = verdict(name, what, found)
            if len(singles) > len(found):
                words[key] += _one_by_one({label: entry[key] for label, entry in singles.items()})
    ways = {way: {key: entry[key] for key in EFFECTS if key in entry} for way, entry in ways.items()}
    return {"recipes": entries, "ways": [{"way": way} | found for way, found in ways.items()], "verdict": words}


def _effects(run: ProbeRun, counts: Counts) -> dict[str, Any]:
    return {name: as_json(value) for name, value in drop_and_recovery(run.sites, counts, run.weights).items()}


def _by_norm(run: ProbeRun, recipes: list[VariantScores]) -> dict[str, dict[str, Any]]:
    """Effects by norm, each site read at its best learning rate."""
    found = {}
    for norm in dict.fromkeys(recipe.settings["feature_norm"] for recipe in recipes):
        counts = [run.counts_of(r.name) for r in recipes if r.settings["feature_norm"] == norm]
        best = torch.stack([dataset_scores(c).miou for c in counts]).argmax(0).tolist()
        pick = lambda field: torch.stack([getattr(counts[b], field)[site] for site, b in enumerate(best)])  # noqa: B023
        tuned = counts[0]._replace(intersection=pick("intersection"), predicted=pick("predicted"))
        found[norm] = _effects(run, tuned)
    return found


def verdict(effect: str, what: str, ways: dict[str, dict[str, Any]]) -> str:
    """In words: under how many ways an effect holds, under which it does not, and what follows.

    Args:
        effect: Its name.
        what: What the ways are: norms, learning rates.
        ways: {"value", "ci95", "holds"} by way.
    """
    holding = [way for way, found in ways.items() if found["holds"]]
    text = f"The {effect} holds under {len(holding)} of {len(ways)} {what}"
    if len(holding) == len(ways):
        sizes = ", ".join(f"{way} {100 * found['value']:+.1f}" for way, found in ways.items()).replace("-", "−")
        return f"{text} ({sizes} pp): it survives the change of the features' scale."
    failing = [f"{way} ({_described(found)})" for way, found in ways.items() if not found["holds"]]
    if holding:
        return f"{text}, not under {'; '.join(failing)}: it depends on how the probe sees the features' scale."
    return f"{text}: {'; '.join(failing)}. There is no ground to claim it."


def _one_by_one(singles: dict[str, dict[str, Any]]) -> str:
    """What becomes of an effect without the choice of a learning rate: a rate that suits one site may fail another."""
    failing = [f"{label} ({_described(found)})" for label, found in singles.items() if not found["holds"]]
    text = f" Taken one by one, it holds under {len(singles) - len(failing)} of {len(singles)} recipes"
    return f"{text}, not under {'; '.join(failing)}." if failing else f"{text}."


def _described(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    sign = "reversed" if high < 0 else "not told from zero"
    return f"{sign}, {100 * found['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def over_seeds(run: ProbeRun) -> list[dict[str, Any]]:
    """Spread over probe seeds beside the interval over images, by site and of both effects; empty for one seed.

    Each entry: {"of", "seeds", "mean", "sd", "lowest", "highest", "ci95" of the main seed}.
    """
    recipes = alike_but_for(run, "seed")
    if len(recipes) == 1:
        return []
    values = {site: [recipe.miou[site] for recipe in recipes] for site in run.sites}
    ci95 = {entry["site"]: entry["miou_ci95"] for entry in run.metrics["sites"]}
    effects = [_effects(run, run.counts_of(recipe.name)) for recipe in recipes]
    for name in EFFECTS:
        if name in effects[0]:
            values[name] = [found[name]["value"] for found in effects]
            ci95[name] = effects[0][name]["ci95"]
    return [
        {
            "of": name,
            "seeds": len(recipes),
            "mean": sum(x) / len(x),
            "sd": torch.tensor(x, dtype=torch.float64).std().item(),
        }
        | {"lowest": min(x), "highest": max(x), "ci95": ci95[name]}
        for name, x in values.items()
    ]
