"""Figures of the knockout against controls, by layer and head, and of attention."""

from typing import Any

import numpy as np

from probes.analyses.style import (
    COLOURS,
    INTERVALS,
    FigureData,
    Figures,
    ReportFigure,
    draw_intervals,
    new_axes,
    new_panels,
    signed_colours,
)
from probes.results.formatting import Rows, bounds
from probes.results.probe_run import ProbeRun

SET_COLOURS = {"incorrect": "#CC3311", "correct": "#0072B2"}
SET_LABELS = {"incorrect": "wrong class", "correct": "correct class"}
CONTROL_LABELS = {"random": "random", "distance": "distance-matched", "mass": "attention-matched"}
CONTROL_LABELS |= {"matched": "distance- and attention-matched"}
GROUP_LABELS = {
    "itself": "itself",
    "correct": "predicted as the correct class",
    "incorrect": "predicted as the same wrong class",
    "other": "other patches",
    "no_image": "text before the image",
}


def effect_rows(knockout: dict[str, Any]) -> Rows:
    """Return every effect in the later half of the layers, as a table."""
    return [
        {"image_attention": knockout["image_attention"]}
        | {key: entry[key] for key in ("class", "condition", "control")}
        | {"value": entry["later"]["value"], **bounds(entry["later"]["ci95"]), "p": entry["later"]["p"]}
        | {"min_p_max_t": min(entry["p_corrected"], default=None)}
        for entry in knockout["effects"]
    ]


def control_effects(knockout: dict[str, Any]) -> FigureData:
    """Draw the effect of blocking each class, and their difference, against no blocking and each control."""
    labels = {name: f"{label} blocked" for name, label in SET_LABELS.items()}
    labels |= {"correct - incorrect": "correct − wrong"}
    lines = []
    for condition, label in labels.items():
        for entry in knockout["effects"]:
            if entry["class"] == "all" and entry["condition"] == condition:
                control = entry["control"].removesuffix(f"_{condition}")
                control = f"{CONTROL_LABELS[control]} patches" if control in CONTROL_LABELS else "no blocking"
                lines.append((f"{label}, against {control}", condition, entry))
    figure, ax = new_axes(6.4, 0.6 + 0.27 * len(lines))
    for y, (_, condition, entry) in enumerate(lines):
        value, (low, high) = 100 * entry["later"]["value"], 100 * np.array(entry["later"]["ci95"])
        colour = SET_COLOURS.get(condition, "#444444")
        ax.errorbar([value], [y], xerr=[[value - low], [high - value]], fmt="o", color=colour, ms=4, capsize=2)
    ax.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=8)
    ax.invert_yaxis()
    ax.axvline(0, color="black", lw=0.8)
    ax.set_xlabel("change in wrong patches left (pp)")
    return FigureData(figure, effect_rows(knockout))


def dose_effects(knockout: dict[str, Any]) -> FigureData | None:
    """Draw the effect of blocking random fractions of a class's patches; None if no fractions were run."""
    doses = sorted(knockout.get("doses", []))
    if not doses:
        return None
    later = {e["condition"]: e["later"] for e in knockout["effects"] if (e["class"], e["control"]) == ("all", "none")}
    figure, ax = new_axes(4.4, 3.3)
    for name, colour in SET_COLOURS.items():
        effects = [*(later[f"{name}@{dose:g}"] for dose in doses), later[name]]
        x, y = [0, *(100 * dose for dose in doses), 100], [0, *(effect["value"] for effect in effects)]
        ci95, label = [[0, 0], *(effect["ci95"] for effect in effects)], f"{SET_LABELS[name]} blocked"
        draw_intervals(ax, x, y, ci95, colour, marker="o", ms=4, capsize=2, label=label)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="share of the class's patches blocked (%)", ylabel="change in wrong patches left (pp)")
    ax.legend(fontsize=8)
    return FigureData(figure, [])


def window_effects(sweep: dict[str, Any]) -> FigureData | None:
    """Draw the effect against random tokens by layers cut and layer read; None if no windows were run."""
    kinds = {"single": "1 layer", "sliding": f"{sweep['windows']} layers", "from": "from layer", "up_to": "up to layer"}
    places = sweep["places"]
    if not any(place["kind"] in kinds for place in places):
        return None
    entry = sweep["classes"][0]
    figure, axes = new_panels(2 * len(kinds), height=2.3, columns=len(kinds), sharey="row")
    maps = {name: 100 * np.array(entry["effect"][name]["mean"]) for name in SET_COLOURS}
    colours, rows = signed_colours(*maps.values()), []
    for ax, (name, kind) in zip(axes, [(name, kind) for name in SET_COLOURS for kind in kinds], strict=True):
        at = [i for i, place in enumerate(places) if place["kind"] == kind]
        image = ax.imshow(maps[name][at, 1:], **colours, aspect="auto")
        labels = [places[i]["layers"][0] if kind != "up_to" else places[i]["layers"][-1] for i in at]
        step = -(-len(labels) // 8)
        ax.set_yticks(range(len(labels))[::step], labels[::step], fontsize=7)
        ticks = range(0, maps[name].shape[1] - 1, -(-(maps[name].shape[1] - 1) // 6))
        ax.set_xticks(ticks, [tick + 1 for tick in ticks], fontsize=7)
        ax.grid(False)
        ax.set_title(f"{SET_LABELS[name]}, {kinds[kind]}", fontsize=7.5)
        effect = entry["effect"][name]
        rows += [
            {"image_attention": sweep["image_attention"], "condition": name, "kind": kind}
            | {"first": places[i]["layers"][0], "last": places[i]["layers"][-1], "layer": layer, "effect": value}
            | bounds(effect["ci95"][i][layer])
            | {"p_max_t": effect["p_corrected"][i][layer]}
            for i in at
            for layer, value in enumerate(effect["mean"][i])
        ]
    figure.supxlabel("layer read", fontsize=9)
    figure.supylabel("layers cut", fontsize=9)
    figure.colorbar(image, ax=axes, label="effect (pp)", shrink=0.6)
    return FigureData(figure, rows)


def head_effects(sweep: dict[str, Any]) -> FigureData | None:
    """Draw the effect of cutting one head of one layer, read at the last layer; None if no heads were run."""
    at = [i for i, place in enumerate(sweep["places"]) if place["kind"] == "head"]
    if not at:
        return None
    figure, axes = new_panels(2, height=2.8, columns=2)
    layers = max(sweep["places"][i]["layers"][0] for i in at)
    entry, rows = sweep["classes"][0], []
    maps = {name: 100 * np.array(entry["effect"][name]["mean"])[at, -1].reshape(layers, -1) for name in SET_COLOURS}
    colours = signed_colours(*maps.values())
    for ax, (name, values) in zip(axes, maps.items(), strict=True):
        image = ax.imshow(values, **colours, aspect="auto")
        ax.set_yticks(range(layers), range(1, layers + 1), fontsize=7)
        ax.set(xlabel="head", ylabel="layer")
        ax.grid(False)
        ax.set_title(SET_LABELS[name], fontsize=9)
        rows += [
            {"condition": name, "layer": layer + 1, "head": head, "effect": values[layer, head] / 100}
            for layer, head in np.ndindex(values.shape)
        ]
    figure.colorbar(image, ax=axes, label="effect at the last layer (pp)")
    return FigureData(figure, rows)


def attention_shares(knockout: dict[str, Any]) -> FigureData | None:
    """Draw the attention of wrong patches by group and layer; dashed: the share under uniform attention."""
    if not knockout.get("attention"):
        return None
    entry = knockout["attention"][0]
    figure, ax = new_axes(4.4, 3.7)
    rows = []
    for colour, (group, label) in zip(COLOURS, GROUP_LABELS.items(), strict=False):
        share, uniform = np.array(entry["share"][group]), entry["uniform"][group]
        layers = np.arange(1, len(share) + 1)
        ax.plot(layers, 100 * share, color=colour, marker="o", ms=3, label=label)
        ax.axhline(100 * uniform, color=colour, ls="--", lw=0.8)
        common = {"image_attention": knockout["image_attention"], "group": group}
        rows += [common | {"layer": i, "share": s, "alike": uniform} for i, s in enumerate(share.tolist(), start=1)]
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="LLM layer", ylabel="attention of wrong patches (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def control_figures(mask: str, run: ProbeRun) -> Figures:
    """Yield the figures of knockout.json and knockout_windows.json of a run."""
    result, sweep = run.analysis("knockout.json"), run.analysis("knockout_windows.json")
    figures = []
    if result and result.get("effects"):
        labels = CONTROL_LABELS
        controls = {entry["control"].split("_")[0] for entry in result["effects"] if entry["class"] == "all"}
        yield ReportFigure(
            f"knockout_controls_{mask}", f"Effects against controls, {mask}",
            "Change in wrong patches left when a class is blocked, against no blocking and against blocking as many "
            f"{' or '.join(text for name, text in labels.items() if name in controls)} patches. Correct − wrong "
            f"measures how class-specific the effect is. Mean over the cases of all classes. {INTERVALS}",
            control_effects(result))  # fmt: skip
        figures += [
            ("knockout_doses", "Effect by share of blocked patches", dose_effects(result), "half",
             f"The same effects when only a random share of the class's patches is blocked. {INTERVALS}"),
            ("attention", "Attention of wrong patches", attention_shares(result), "half",
             "Attention of wrong patches in the unmodified model, by what the adapter's probe predicts for the "
             "attended patch. Dashed: expected share under uniform attention."),
        ]  # fmt: skip
    if sweep:
        figures += [
            ("knockout_windows", "Effect by layers cut", window_effects(sweep), "wide",
             "Effect against as many random patches when only some layers are cut. Rows: first layer cut (for up to "
             "layer, the last). Columns: layer read. Look for windows after which the effect persists: these "
             "layers correct patches."),
            ("knockout_heads", "Effect by attention head cut", head_effects(sweep), "full",
             "Effect against as many random patches when a single head of a single layer is cut."),
        ]  # fmt: skip
    for name, title, data, width, caption in figures:
        if data is not None:
            yield ReportFigure(f"{name}_{mask}", f"{title}, {mask}", caption, data, width)
