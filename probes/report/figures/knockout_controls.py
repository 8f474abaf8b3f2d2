"""The knockout's effects against controls, where it acts, where wrong patches look, and what turned images say."""

from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm

from probes.report.study import Rows

from .style import COLOURS, FigureData, new_axes, panels

SET_COLOURS = {"incorrect": "#CC3311", "correct": "#0072B2"}
GROUP_LABELS = {
    "itself": "itself",
    "correct": "predicted the right class",
    "incorrect": "predicted the same wrong class",
    "other": "other patches",
    "no_image": "text before the image",
}


def effects_of(facts: dict[str, Any], condition: str, control: str, name: str = "all") -> dict[str, Any] | None:
    """The entry of knockout.json about a condition against a control, for a class or all; None if there is none."""
    wanted = (name, condition, control)
    found = [e for e in facts.get("effects", []) if (e["class"], e["condition"], e["control"]) == wanted]
    return found[0] if found else None


def effect_rows(facts: dict[str, Any]) -> Rows:
    """Every effect in the later half of the layers, as a table."""
    rows = []
    for entry in facts.get("effects", []):
        (low, high), later = entry["later"]["ci95"], entry["later"]
        head = {"image_attention": facts["image_attention"]} | {k: entry[k] for k in ("class", "condition", "control")}
        smallest = min(entry["p_corrected"], default=None)
        rows.append(
            head | {"value": later["value"], "low": low, "high": high, "p": later["p"], "min_p_max_t": smallest}
        )
    return rows


def knockout_controls(facts: dict[str, Any]) -> FigureData:
    """Effects of both sets, and their difference, against nothing hidden and against each control, later layers."""
    kinds = {"incorrect": "wrong class hidden", "correct": "right class hidden", "correct - incorrect": "right − wrong"}
    lines = []
    for condition, label in kinds.items():
        for entry in facts["effects"]:
            if entry["class"] == "all" and entry["condition"] == condition:
                control = entry["control"].removesuffix(f"_{condition}")
                lines.append(
                    (f"{label}, against {'nothing hidden' if control == 'none' else control}", condition, entry)
                )
    figure, ax = new_axes(6.4, 0.6 + 0.27 * len(lines))
    for y, (_, condition, entry) in enumerate(lines):
        value, (low, high) = 100 * entry["later"]["value"], 100 * np.array(entry["later"]["ci95"])
        colour = SET_COLOURS.get(condition, "#444444")
        ax.errorbar([value], [y], xerr=[[value - low], [high - value]], fmt="o", color=colour, ms=4, capsize=2)
    ax.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlabel("change in wrong patches left (pp)")
    return FigureData(figure, effect_rows(facts))


def knockout_doses(facts: dict[str, Any]) -> FigureData | None:
    """The effect of hiding a part of a set, by how large a part; None where no doses were run."""
    doses = sorted(facts.get("doses", []))
    if not doses:
        return None
    figure, ax = new_axes(4.4, 3.3)
    for name, colour in SET_COLOURS.items():
        entries = [effects_of(facts, f"{name}@{dose:g}", "none") for dose in doses] + [effects_of(facts, name, "none")]
        x, y = [0, *(100 * dose for dose in doses), 100], 100 * np.array([0] + [e["later"]["value"] for e in entries])
        low, high = 100 * np.array([[0, 0]] + [e["later"]["ci95"] for e in entries]).T
        label = {"incorrect": "wrong class hidden", "correct": "right class hidden"}[name]
        ax.errorbar(x, y, [y - low, high - y], color=colour, marker="o", ms=4, capsize=2, label=label)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="share of its patches hidden (%)", ylabel="change in wrong patches left (pp)")
    ax.legend(fontsize=8)
    return FigureData(figure, [])


def knockout_windows(facts: dict[str, Any]) -> FigureData | None:
    """Effect against random tokens by window of layers and layer read; None where no windows were run."""
    kinds = {"single": "one layer", "sliding": f"{facts['windows']} in a row", "from": "from … on", "up_to": "up to …"}
    places = facts["places"]
    if not any(place["kind"] in kinds for place in places):
        return None
    entry = facts["classes"][0]
    figure, axes = panels(2 * len(kinds), height=2.3, columns=len(kinds), sharey="row")
    maps = {name: 100 * np.array(entry["effect"][name]["mean"]) for name in SET_COLOURS}
    most = max(1.0, *(abs(values).max() for values in maps.values()))
    rows = []
    for ax, (name, kind) in zip(axes, [(name, kind) for name in SET_COLOURS for kind in kinds], strict=True):
        at = [i for i, place in enumerate(places) if place["kind"] == kind]
        image = ax.imshow(maps[name][at, 1:], cmap="PuOr_r", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
        named = [places[i]["layers"][0] if kind != "up_to" else places[i]["layers"][-1] for i in at]
        step = -(-len(named) // 8)
        ax.set_yticks(range(len(named))[::step], named[::step], fontsize=7)
        ticks = range(0, maps[name].shape[1] - 1, -(-(maps[name].shape[1] - 1) // 6))
        ax.set_xticks(ticks, [tick + 1 for tick in ticks], fontsize=7)
        ax.grid(False)
        ax.set_title(f"{ {'incorrect': 'wrong', 'correct': 'right'}[name] } class, {kinds[kind]}", fontsize=7.5)
        rows += _window_rows(facts["image_attention"], entry, name, at, places)
    figure.supxlabel("layer read", fontsize=9)
    figure.supylabel("layers cut", fontsize=9)
    figure.colorbar(image, ax=axes, label="effect (pp)", shrink=0.6)
    return FigureData(figure, rows)


def _window_rows(mask: str, entry: dict[str, Any], name: str, at: list[int], places: list[dict]) -> Rows:
    effect, rows = entry["effect"][name], []
    for i in at:
        where = {"kind": places[i]["kind"], "first": places[i]["layers"][0], "last": places[i]["layers"][-1]}
        for layer, value in enumerate(effect["mean"][i]):
            (low, high), p = effect["ci95"][i][layer], effect["p_corrected"][i][layer]
            facts = {"image_attention": mask, "condition": name, **where, "layer": layer}
            rows.append(facts | {"effect": value, "low": low, "high": high, "p_max_t": p})
    return rows


def knockout_heads(facts: dict[str, Any]) -> FigureData | None:
    """Effect of cutting one head of one layer, read at the last layer; None where no heads were run."""
    at = [i for i, place in enumerate(facts["places"]) if place["kind"] == "head"]
    if not at:
        return None
    figure, axes = panels(2, height=2.8, columns=2)
    layers = max(facts["places"][i]["layers"][0] for i in at)
    entry, rows = facts["classes"][0], []
    maps = {name: 100 * np.array(entry["effect"][name]["mean"])[at, -1].reshape(layers, -1) for name in SET_COLOURS}
    most = max(1.0, *(abs(values).max() for values in maps.values()))
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(values, cmap="PuOr_r", norm=TwoSlopeNorm(0, -most, most), aspect="auto")
        ax.set_yticks(range(layers), range(1, layers + 1), fontsize=7)
        ax.set(xlabel="head", ylabel="layer")
        ax.grid(False)
        ax.set_title(f"{ {'incorrect': 'wrong', 'correct': 'right'}[name] } class", fontsize=9)
        rows += [
            {"condition": name, "layer": layer + 1, "head": head, "effect": values[layer, head] / 100}
            for layer, head in np.ndindex(values.shape)
        ]
    figure.colorbar(image, ax=axes, label="effect at the last layer (pp)")
    return FigureData(figure, rows)


def attention_shares(facts: dict[str, Any]) -> FigureData | None:
    """Where wrong patches look, by layer; dashed, where they would did they look alike at all they see."""
    if not facts.get("attention"):
        return None
    entry = facts["attention"][0]
    figure, ax = new_axes(4.4, 3.7)
    rows = []
    for colour, (group, label) in zip(COLOURS, GROUP_LABELS.items(), strict=False):
        share, uniform = np.array(entry["share"][group]), entry["uniform"][group]
        layers = np.arange(1, len(share) + 1)
        ax.plot(layers, 100 * share, color=colour, marker="o", ms=3, label=label)
        ax.axhline(100 * uniform, color=colour, ls="--", lw=0.8)
        rows += [
            {
                "image_attention": facts["image_attention"],
                "group": group,
                "layer": int(layer),
                "share": s,
                "alike": uniform,
            }
            for layer, s in zip(layers, share.tolist(), strict=True)
        ]
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="LLM layer", ylabel="attention of wrong patches (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def starvation_flip(facts: dict[str, Any], flip: dict[str, Any]) -> FigureData:
    """The gap by patch of upright images and, by an entry of its "flips", of turned ones, side by side."""
    figure, axes = new_axes(6.4, 3.2, 2)
    grids = [100 * np.array(values).reshape(facts["grid"]) for values in (facts["gap"], flip["gap"])]
    most = max(1.0, *(abs(grid).max() for grid in grids))
    for ax, grid, title in zip(axes, grids, ("upright", f"turned ({flip['flip']})"), strict=True):
        image = ax.imshow(grid, cmap="PuOr_r", norm=TwoSlopeNorm(0, -most, most))
        ax.set(xticks=[], yticks=[], title=title)
        ax.grid(False)
    figure.colorbar(image, ax=axes, label="bidirectional − causal (pp)")
    keys = ("causal", "bidirectional", "gap")
    return FigureData(figure, [{"patch": i} | {k: flip[k][i] for k in keys} for i in range(len(facts["gap"]))])


def starvation_by_class(facts: dict[str, Any]) -> FigureData:
    """The gap of the first patches as it is, and as if all patches showed the same mix of classes."""
    figure, ax = new_axes(6.4, 3.3)
    held = facts["by_class"]
    x = np.arange(len(held["gap"]))
    low, high = 100 * np.array(held["gap_ci95"]).T
    ax.bar(x, 100 * np.array(facts["gap"][: len(x)]), color="#BBBBBB", width=0.85, label="as it is")
    y = 100 * np.array(held["gap"])
    ax.errorbar(x, y, [y - low, high - y], fmt="o", ms=3, color="#D55E00", lw=0.8, label="the same mix of classes")
    ax.axhline(0, color="black", lw=0.8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="patch, in raster order", ylabel="bidirectional − causal (pp)")
    ax.legend(fontsize=8)
    return FigureData(
        figure, [{"patch": i, "gap": facts["gap"][i], "standardised": held["gap"][i]} for i in range(len(x))]
    )
