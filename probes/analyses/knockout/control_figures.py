"""Figure of the knockout by layers cut."""

from typing import Any

import numpy as np

from probes.analyses.style import (
    FigureData,
    Figures,
    ReportFigure,
    new_panels,
    signed_colours,
)
from probes.results.formatting import bounds
from probes.results.probe_run import ProbeRun

SET_COLOURS = {"incorrect": "#CC3311", "correct": "#0072B2"}
SET_LABELS = {"incorrect": "wrong class", "correct": "correct class"}


def window_effects(sweep: dict[str, Any]) -> FigureData:
    """Draw the effect against random tokens by layers cut and layer read."""
    sliding = f"{sweep['layer_windows']} layers"
    kinds = {
        "single": "1 layer",
        "sliding": sliding,
        "from": "from layer",
        "up_to": "up to layer",
    }
    places = sweep["places"]
    entry = sweep["classes"][0]
    figure, axes = new_panels(
        2 * len(kinds),
        height=2.3,
        columns=len(kinds),
        sharey="row",
    )
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
        columns = maps[name].shape[1] - 1
        ticks = range(0, columns, -(-columns // 6))
        ax.set_xticks(ticks, [tick + 1 for tick in ticks], fontsize=7)
        ax.grid(False)
        ax.set_title(f"{SET_LABELS[name]}, {kinds[kind]}", fontsize=7.5)
        effect = entry["effect"][name]
        rows += [
            {
                "image_attention": sweep["image_attention"],
                "condition": name,
                "kind": kind,
            }
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
    figure.colorbar(
        image,
        ax=axes,
        label="effect (pp)",
        shrink=0.6,
    )
    return FigureData(figure, rows)


def control_figures(mask: str, run: ProbeRun) -> Figures:
    """Yield the figure of knockout_windows.json of a run, if it has one."""
    sweep = run.analysis("knockout_windows.json")
    if sweep:
        yield ReportFigure(
            f"knockout_windows_{mask}", f"Effect by layers cut, {mask}",
            "Effect against as many random patches when only some layers are cut. Rows: first layer cut (for up to "
            "layer, the last). Columns: layer read. Look for windows after which the effect persists: these layers "
            "correct patches.",
            window_effects(sweep), "wide",)  # fmt: skip
