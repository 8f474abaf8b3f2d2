"""Curves and effects under several ways of training the probes: norms, rates, heads, seeds, shuffled labels."""

from typing import Any

from probes.models.frozen_mllm import FINAL_NORM
from probes.report.probe_sensitivity import EFFECTS, VariantScores
from probes.report.study import Study
from probes.results.probe_run import ProbeRun

from .layer_curves import curve_of, shown_sites
from .style import COLOURS, FigureData, colour_of, label_sites, new_axes, panels, position, score_row

DASHES = ("-", "--", ":", "-.")


def recipe_curves(found: dict[str, tuple[ProbeRun, list[VariantScores]]], *keys: str) -> FigureData:
    """MIoU over the stack under several recipes, a panel a mask.

    Args:
        found: Run and recipes by mask.
        keys: The settings in which the recipes differ: colours go by the first, dashes by the others.
    """
    figure, axes = panels(len(found), height=3.4, columns=2, sharey=True)
    rows = []
    for ax, (mask, (run, recipes)) in zip(axes, found.items(), strict=True):
        first = list(dict.fromkeys(recipe.settings[keys[0]] for recipe in recipes))
        rest = list(dict.fromkeys(tuple(recipe.settings[key] for key in keys[1:]) for recipe in recipes))
        for recipe in recipes:
            colour = COLOURS[first.index(recipe.settings[keys[0]]) % len(COLOURS)]
            dash = DASHES[rest.index(tuple(recipe.settings[key] for key in keys[1:])) % len(DASHES)]
            main = recipe.name is None
            ax.plot(*curve_of(recipe.entries), dash, color=colour, lw=2.4 if main else 1.3, label=recipe.label(*keys))
            rows += [
                {"image_attention": mask, "recipe": recipe.name or "main"} | recipe.settings | score_row(entry)
                for entry in recipe.entries
            ]
        label_sites(ax, shown_sites(run), 8, fontsize=8)
        ax.set_title(mask, fontsize=10)
    axes[0].set_ylabel("mIoU (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return FigureData(figure, rows)


def effects_by_recipe(scale: dict[str, dict[str, Any]]) -> FigureData:
    """Drop-off and recovery with intervals under each norm and learning rate, masks side by side.

    Args:
        scale: What :func:`..recipes.scale_confound` says, by mask.
    """
    names = list(dict.fromkeys(_name(entry) for facts in scale.values() for entry in facts["recipes"]))
    figure, axes = new_axes(6.6, 0.34 * len(names) * len(scale) + 1.2, 2, sharey=True)
    rows = []
    for ax, (effect, text) in zip(axes, EFFECTS.items(), strict=True):
        for i, (mask, facts) in enumerate(scale.items()):
            for entry in facts["recipes"]:
                found = entry.get(effect)
                if found is None:
                    continue
                y = -names.index(_name(entry)) - 0.22 * (i - (len(scale) - 1) / 2)
                (low, high), colour = found["ci95"], colour_of(mask)
                ax.hlines(y, 100 * low, 100 * high, color=colour, lw=1.5)
                ax.plot(100 * found["value"], y, "o", ms=5, markeredgecolor=colour,
                        markerfacecolor=colour if found["holds"] else "white")  # fmt: skip
                keys = ("recipe", "feature_norm", "learning_rate", "peak_site")
                row = {"image_attention": mask} | {key: entry[key] for key in keys} | {"effect": effect}
                rows.append(row | {"value": found["value"], "low": low, "high": high, "holds": found["holds"]})
        ax.axvline(0, color="black", lw=0.8)
        ax.set_xlabel(f"{text} (pp)")
    axes[0].set_yticks([-i for i in range(len(names))], names, fontsize=8)
    for mask in scale:
        axes[0].plot([], [], "o-", color=colour_of(mask), label=mask)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def _name(entry: dict[str, Any]) -> str:
    return f"norm {entry['feature_norm']}, lr {entry['learning_rate']}"


def controls(study: Study, shuffled: dict[str, list[VariantScores]]) -> FigureData:
    """What the probe and the architecture give without training: shuffled labels, the untrained model, the commonest
    class.
    """
    figure, ax = new_axes(6.4, 3.6)
    rows = []
    for mask, run in study.trained.items():
        kinds = [("trained", "-", run.metrics["sites"])]
        if mask in study.untrained:
            kinds.append(("untrained model", "--", study.untrained[mask].metrics["sites"]))
        kinds += [("shuffled labels", ":", recipe.entries) for recipe in shuffled.get(mask, [])]
        for kind, dash, entries in kinds:
            ax.plot(*curve_of(entries), dash, color=colour_of(mask), lw=1.8, label=f"{mask}, {kind}")
            rows += [{"image_attention": mask, "control": kind} | score_row(entry) for entry in entries]
    baseline = study.first.metrics["baseline"]["miou"]
    ax.axhline(100 * baseline, color="#444444", lw=0.9, ls="-.", label="always the commonest class")
    label_sites(ax, shown_sites(*study.runs))
    ax.set_ylabel("mIoU (%)")
    ax.set_ylim(bottom=0)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def seed_curves(found: dict[str, tuple[ProbeRun, list[VariantScores]]]) -> FigureData:
    """The main seed's curve with its interval over images, and the other seeds' beside it."""
    figure, axes = panels(len(found), height=3.2, columns=2, sharey=True)
    rows = []
    for ax, (mask, (run, recipes)) in zip(axes, found.items(), strict=True):
        entries = [entry for entry in run.metrics["sites"] if entry["site"] != FINAL_NORM]
        low, high = ([100 * entry["miou_ci95"][i] for entry in entries] for i in (0, 1))
        x = [position(entry["site"]) for entry in entries]
        ax.fill_between(x, low, high, color=colour_of(mask), alpha=0.15, lw=0, label="95% over images")
        for recipe in recipes:
            ax.plot(*curve_of(recipe.entries), color=colour_of(mask), lw=1, alpha=0.8,
                    label="probe seeds" if recipe is recipes[0] else None)  # fmt: skip
            rows += [
                {"image_attention": mask, "seed": recipe.settings["seed"]} | score_row(entry)
                for entry in recipe.entries
            ]
        label_sites(ax, shown_sites(run), 8, fontsize=8)
        ax.set_title(mask, fontsize=10)
        ax.legend(fontsize=8)
    axes[0].set_ylabel("mIoU (%)")
    return FigureData(figure, rows)
