"""Figures of the knockout by layers cut, and of the attention of wrong patches."""

from typing import Any

import numpy as np

from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    new_axes,
    new_panels,
    signed_colours,
)
from probes.results.formatting import bounds
from probes.results.probe_run import ProbeRun

SET_COLOURS = {"incorrect": "#CC3311", "correct": "#0072B2"}
SET_LABELS = {"incorrect": "wrong class", "correct": "correct class"}
GROUP_LABELS = {
    "itself": "itself",
    "correct": "predicted as the correct class",
    "incorrect": "predicted as the same wrong class",
    "other": "other patches",
    "no_image": "text before the image",
}


def window_effects(sweep: dict[str, Any]) -> FigureData:
    """Draw the effect against random tokens by layers cut and layer read."""
    sliding = f"{sweep['layer_windows']} layers"
    kinds = {"single": "1 layer", "sliding": sliding, "from": "from layer", "up_to": "up to layer"}
    places = sweep["places"]
    entry = sweep["classes"][0]
    figure, axes = new_panels(2 * len(kinds), height=2.3, columns=len(kinds), sharey="row")
    maps = {name: 100 * np.array(entry["effect"][name]["mean"]) for name in SET_COLOURS}
    colours = signed_colours(*maps.values())
    rows = []
    for ax, (name, kind) in zip(
        axes, [(name, kind) for name in SET_COLOURS for kind in kinds], strict=True
    ):
        at = [i for i, place in enumerate(places) if place["kind"] == kind]
        image = ax.imshow(maps[name][at, 1:], **colours, aspect="auto")
        labels = [
            places[i]["layers"][0] if kind != "up_to" else places[i]["layers"][-1] for i in at
        ]
        step = -(-len(labels) // 8)
        ax.set_yticks(range(len(labels))[::step], labels[::step], fontsize=7)
        ticks = range(0, maps[name].shape[1] - 1, -(-(maps[name].shape[1] - 1) // 6))
        ax.set_xticks(ticks, [tick + 1 for tick in ticks], fontsize=7)
        ax.grid(False)
        ax.set_title(f"{SET_LABELS[name]}, {kinds[kind]}", fontsize=7.5)
        effect = entry["effect"][name]
        rows += [
            {"image_attention": sweep["image_attention"], "condition": name, "kind": kind}
            | {
                "first": places[i]["layers"][0],
                "last": places[i]["layers"][-1],
                "layer": layer,
                "effect": value,
            }
            | bounds(effect["ci95"][i][layer])
            | {"p_max_t": effect["p_corrected"][i][layer]}
            for i in at
            for layer, value in enumerate(effect["mean"][i])
        ]
    figure.supxlabel("layer read", fontsize=9)
    figure.supylabel("layers cut", fontsize=9)
    figure.colorbar(image, ax=axes, label="effect (pp)", shrink=0.6)
    return FigureData(figure, rows)


def attention_shares(knockout: dict[str, Any]) -> FigureData:
    """Draw the attention of wrong patches by group and layer; dashed: the share under uniform attention."""
    entry = knockout["attention"][0]
    figure, ax = new_axes(4.4, 3.7)
    rows = []
    for colour, (group, label) in zip(COLOURS, GROUP_LABELS.items(), strict=False):
        share = np.array(entry["share"][group])
        uniform = entry["uniform"][group]
        layers = np.arange(1, len(share) + 1)
        ax.plot(layers, 100 * share, color=colour, marker="o", ms=3, label=label)
        ax.axhline(100 * uniform, color=colour, ls="--", lw=0.8)
        common = {"image_attention": knockout["image_attention"], "group": group}
        rows += [
            common | {"layer": i, "share": s, "alike": uniform}
            for i, s in enumerate(share.tolist(), start=1)
        ]
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="LLM layer", ylabel="attention of wrong patches (%)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return FigureData(figure, rows)


def control_figures(mask: str, run: ProbeRun) -> Figures:
    """Yield the figures of attention and of knockout_windows.json of a run, if it has them."""
    result = run.analysis("knockout.json")
    sweep = run.analysis("knockout_windows.json")
    if result.get("attention"):
        yield ReportFigure(
            f"attention_{mask}", f"Attention of wrong patches, {mask}",
            "Attention of wrong patches in the unmodified model, by what the adapter's probe predicts for the "
            "attended patch. Dashed: expected share under uniform attention.",
            attention_shares(result), "half")  # fmt: skip
    if sweep:
        yield ReportFigure(
            f"knockout_windows_{mask}", f"Effect by layers cut, {mask}",
            "Effect against as many random patches when only some layers are cut. Rows: first layer cut (for up to "
            "layer, the last). Columns: layer read. Look for windows after which the effect persists: these layers "
            "correct patches.",
            window_effects(sweep), "wide")  # fmt: skip
