"""Figures of the attention knockout: wrong patches left by layer (Fig. 11), and effects by class and control."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llava_bidir.common.bootstrap import interval
from probes.analyses.style import (
    COLOURS,
    INTERVALS,
    FigureData,
    Figures,
    ReportFigure,
    draw_curve,
    new_axes,
    new_panels,
)
from probes.results.formatting import Rows, bounds
from probes.results.probe_run import ProbeRun

from .effects import CLAIMED_SIGN, SPECIFICITY, read_knockout, select_cases

CONDITION_STYLES = {
    "none": ("#444444", "-", "no blocking"),
    "incorrect": ("#CC3311", "-", "wrong class blocked"),
    "correct": ("#0072B2", "-", "correct class blocked"),
    "random_incorrect": ("#EE9988", ":", "as many random patches (wrong)"),
    "random_correct": ("#77BBDD", ":", "as many random patches (correct)"),
}
EFFECT_TITLES = {
    "incorrect": "wrong class blocked",
    "correct": "correct class blocked",
    SPECIFICITY: "correct − wrong",
}
CONTROL_LABELS = {
    "none": "no blocking",
    "random": "random patches",
    "matched": "patches matched in distance and attention",
}


def wrong_patches_left(run: ProbeRun) -> FigureData:
    """Draw the wrong patches left per layer and condition, over all classes and by class (Fig. 11)."""
    tensors = read_knockout(run)
    names = [entry["class"] for entry in run.analysis("knockout.json")["classes"]]
    figure, axes = new_panels(
        1 + len(names),
        height=1.9,
        columns=4,
        sharex=True,
    )
    rows = []
    for ax, name in zip(axes, (None, *names), strict=True):
        rows += _draw_rates(ax, run, tensors, name)
    figure.supylabel("wrong patches left (%)", fontsize=9)
    figure.supxlabel("LLM layer (0 = adapter)", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
    )
    return FigureData(figure, rows)


def _draw_rates(
    ax: Axes,
    run: ProbeRun,
    tensors: dict[str, Any],
    name: str | None,
) -> Rows:
    """Draw n_c(l) / n_c(0) of one class, or of all, with intervals over images; return the rows of the CSV file."""
    cases = select_cases(tensors, None if name is None else [name])
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(labelsize=7)
    ax.set_title(
        f"{name or 'all classes'} ({0 if cases is None else len(cases.images)} cases)", fontsize=8
    )
    if cases is None:
        return []
    rows = []
    for condition, (colour, dash, label) in CONDITION_STYLES.items():
        mean, resampled = cases.mean(cases.rates[condition], run.weights)
        ci95 = [interval(m, resampled[:, i]) for i, m in enumerate(mean.tolist())]
        band = 100 * np.array(ci95) if dash == "-" else None
        draw_curve(
            ax,
            range(len(mean)),
            100 * mean,
            band,
            colour,
            dash,
            label=label,
        )
        common = {
            "image_attention": run.mask,
            "class": name or "all",
            "condition": condition,
        }
        rows += [
            common
            | {
                "layer": layer,
                "cases": len(cases.images),
                "remaining": m,
                **bounds(ci95[layer]),
            }
            for layer, m in enumerate(mean.tolist())
        ]
    return rows


def effect_rows(knockout: dict[str, Any]) -> Rows:
    """Return every effect in the later half of the layers, as a table."""
    return [
        {"image_attention": knockout["image_attention"]}
        | {key: entry[key] for key in ("class", "condition", "control", "images", "cases")}
        | {"value": entry["later"]["value"], **bounds(entry["later"]["ci95"])}
        | {"p": entry["later"]["p"], "p_holm": entry["later"]["p_holm"]}
        | {"min_p_max_t": min(entry["p_corrected"], default=None)}
        for entry in knockout["effects"]
    ]


def effects_by_class(knockout: dict[str, Any]) -> FigureData:
    """Draw the effects in the later half of the layers by class and control; filled if significant."""
    shown = [entry for entry in knockout["effects"] if entry["condition"] in EFFECT_TITLES]

    def control_of(entry):
        return entry["control"].removesuffix(f"_{entry['condition']}")

    names = list(dict.fromkeys(entry["class"] for entry in shown))
    controls = list(dict.fromkeys(control_of(entry) for entry in shown))
    figure, axes = new_axes(
        6.8, 0.9 + 0.11 * (len(controls) + 1) * len(names), len(EFFECT_TITLES), sharey=True
    )
    for ax, (condition, title) in zip(axes, EFFECT_TITLES.items(), strict=True):
        for entry in (entry for entry in shown if entry["condition"] == condition):
            number = controls.index(control_of(entry))
            later = entry["later"]
            y = names.index(entry["class"]) + (number - (len(controls) - 1) / 2) / (
                len(controls) + 1
            )
            colour = COLOURS[number]
            p = later["p"] if entry["class"] == "all" else later["p_holm"]
            ax.plot(100 * np.array(later["ci95"]), [y, y], color=colour, lw=1.2)
            fill = colour if p is not None and p < 0.05 else "white"
            ax.plot(
                [100 * later["value"]],
                [y],
                "o",
                color=colour,
                mfc=fill,
                ms=3.5,
            )
        ax.set_title(
            f"{title}\nclaimed: {'below' if CLAIMED_SIGN[condition] < 0 else 'above'} 0", fontsize=8
        )
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.tick_params(axis="x", labelsize=7)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[1].set_xlabel("change in wrong patches left (pp)", fontsize=8)
    for number, control in enumerate(controls):
        axes[0].plot(
            [],
            [],
            "o",
            color=COLOURS[number],
            ms=3.5,
            label=f"against {CONTROL_LABELS[control]}",
        )
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    return FigureData(figure, effect_rows(knockout))


def knockout_figures(mask: str, run: ProbeRun) -> Figures:
    """Yield the figures of the paper's knockout of a run."""
    yield ReportFigure(
        f"knockout_{mask}", f"Wrong patches left, {mask}",
        "Share of the adapter's wrong patches still wrong at each layer, over all images, and by wrongly predicted "
        "class (Fig. 11). The paper expects red (wrong class blocked) below grey (no blocking) and blue (correct class "
        "blocked) above it. Dotted: as many random patches blocked. Bands: 95% intervals over images.",
        wrong_patches_left(run), "wide",)  # fmt: skip
    yield ReportFigure(
        f"knockout_effects_{mask}", f"Effects against controls, {mask}",
        "Change in wrong patches left in the later half of the layers, over the cases of all classes and by class, "
        "against no blocking and against blocking as many other patches. Correct − wrong measures how class-specific "
        "the effect is. Filled: p < 0.05 in a permutation test, of classes with Holm's correction for their number. "
        f"{INTERVALS}",
        effects_by_class(run.analysis("knockout.json")), "wide",)  # fmt: skip
