"""Figure of drop-off and recovery at every strength of regularisation."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probes.report.path import verdict_rows
from probes.report.study import Study
from probes.report.summary_text import PATH_SECTION

from .style import FigureData, Figures, ReportFigure, caption, mask_colour, new_panels

EFFECTS = {
    "adapter_drop": "encoder minus adapter",
    "recovery": "best layer minus adapter",
    "recovery_trained": "the same minus untrained",
}
MEASURES = {"miou": (100, "mIoU (pp)"), "cross_entropy": (1, "cross-entropy\n(nats per pixel)")}  # factor, label

Verdicts = list[dict[str, Any]]


def path_effects(verdicts: Verdicts, of_trained: dict[tuple[str, str], float]) -> FigureData:
    """Draw the effects against the strength: mIoU above, cross-entropy below.

    Args:
        verdicts: Entry "path" of results.json.
        of_trained: mIoU effects of trained probes, by mask and effect.
    """
    effects = [effect for effect in EFFECTS if any(verdict["effect"] == effect for verdict in verdicts)]
    figure, axes = new_panels(2 * len(effects), height=2.3, columns=len(effects), sharex=True)
    for i, ax in enumerate(axes):
        measure, effect = list(MEASURES)[i // len(effects)], effects[i % len(effects)]
        shown = [verdict for verdict in verdicts if (verdict["effect"], verdict["measure"]) == (effect, measure)]
        for verdict in shown:
            _draw_path(ax, verdict, MEASURES[measure][0])
        ax.axhline(0, color="black", lw=0.8)
        if measure == "miou":
            ax.set_title(EFFECTS[effect], fontsize=9)
            for mask in dict.fromkeys(verdict["image_attention"] for verdict in shown):
                if (mask, effect) in of_trained:
                    ax.axhline(100 * of_trained[mask, effect], color=mask_colour(mask), ls=":", lw=1.3)
        else:
            _compress_outliers(ax, [abs(row["value"]) for verdict in shown for row in verdict["estimates"]])
        if i % len(effects) == 0:
            ax.set_ylabel(MEASURES[measure][1], fontsize=9)
        ax.set_xscale("log")
        ax.tick_params(labelsize=8)
    for ax in axes[-len(effects) :]:
        ax.set_xlabel("strength", fontsize=9)
    legend = _legend(verdicts, bool(of_trained))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)), fontsize=8)
    return FigureData(figure, verdict_rows(verdicts))


def _compress_outliers(ax: Axes, sizes: list[float]) -> None:
    """Use a logarithmic scale beyond the usual size if the largest is far from it: losses explode at some strengths."""
    usual = float(np.median(sizes))
    if max(sizes) > 10 * usual > 0:
        step = float(f"{usual:.0e}")  # one digit
        ax.set_yscale("symlog", linthresh=2 * step, linscale=2)
        limits, ticks = ax.get_ylim(), step * np.array([1, 2, 10, 100, 1000])
        ax.set_yticks([*-ticks[::-1], 0, *ticks])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(limits)


def _draw_path(ax: Axes, verdict: dict[str, Any], factor: float) -> None:
    """Draw the closed form as a line with its band, the optimum as points; hollow where it has not converged."""
    colour, estimates = mask_colour(verdict["image_attention"]), verdict["estimates"]
    x, *lines = (np.array([row[key] for row in estimates]) for key in ("strength", "value", "low", "high"))
    value, low, high = (factor * line for line in lines)
    if verdict["instrument"] == "closed_form":
        ax.plot(x, value, color=colour, lw=1.6)
        ax.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
        return
    ax.errorbar(x, value, [value - low, high - value], color=colour, fmt="none", elinewidth=1.2, capsize=2)
    for row, r, y in zip(estimates, x, value, strict=True):
        ax.plot(r, y, "o", ms=4.5, markeredgecolor=colour, markerfacecolor=colour if row["converged"] else "white")


def _legend(verdicts: Verdicts, sgd: bool) -> list:
    masks, grey = dict.fromkeys(verdict["image_attention"] for verdict in verdicts), "#444444"
    point = {"color": grey, "marker": "o", "ms": 4.5, "ls": ""}
    kinds = [Line2D([], [], color=grey, label="closed form")]
    if any(verdict["instrument"] == "optimum" for verdict in verdicts):
        kinds.append(Line2D([], [], **point, label="optimum of the loss"))
    if any(verdict["not_converged"] for verdict in verdicts):
        kinds.append(Line2D([], [], **point, markerfacecolor="white", label="not converged"))
    if sgd:
        kinds.append(Line2D([], [], color=grey, ls=":", label="trained with AdamW"))
    return [Patch(color=mask_colour(mask), label=mask) for mask in masks] + kinds


def path_figures(study: Study, results: dict[str, Any]) -> Figures:
    """Yield the figure of solved probes at every strength."""
    if not results["path"]:
        return
    claims = [claim for claim in results["claims"] if claim["claim"] in EFFECTS]
    of_trained = {(claim["image_attention"], claim["claim"]): claim["value"] for claim in claims}
    of_trained = {key: value for key, value in of_trained.items() if not study.trained[key[0]].is_solved}
    yield ReportFigure(
        "path", PATH_SECTION, "Drop-off and recovery at every strength",
        caption(
            "Differences of mIoU and of cross-entropy between sites, all with probes of the same strength of "
            "regularisation; above zero, the first site is better. Lines: probes in closed form. Points: probes at the "
            "optimum of the loss. Where some losses explode, the axis is logarithmic away from zero.",
            "Hollow: not converged, not counted." if any(v["not_converged"] for v in results["path"]) else "",
            "Dotted: probes trained with AdamW." if of_trained else "",
            "Check whether a whole curve lies above zero. Bands and bars: 95% intervals that hold at all strengths "
            "together. The best layer is chosen by cross-validation over images.",
        ),
        path_effects(results["path"], of_trained))  # fmt: skip
