"""Figure of drop-off and recovery at the chosen strength of regularisation and its neighbours."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from probes.analyses.style import FigureData, Figures, ReportFigure, caption, mask_colour, new_panels
from probes.report.path import ROWS, verdict_rows
from probes.results.study import Study

EFFECTS = {
    "adapter_drop": "encoder minus adapter",
    "recovery": "best layer minus adapter",
    "recovery_trained": "the same minus untrained",
}
MEASURES = {"miou": (100, "mIoU (pp)"), "cross_entropy": (1, "cross-entropy\n(nats per pixel)")}  # factor, label
MASK_OFFSET = 0.12  # between the points of two masks

Verdicts = list[dict[str, Any]]


def path_effects(verdicts: Verdicts, of_trained: dict[tuple[str, str], float]) -> FigureData:
    """Draw the effects at three strengths: mIoU above, cross-entropy below.

    Args:
        verdicts: Entry "path" of results.json.
        of_trained: mIoU effects of trained probes, by mask and effect.
    """
    effects = [effect for effect in EFFECTS if any(verdict["effect"] == effect for verdict in verdicts)]
    figure, axes = new_panels(2 * len(effects), height=2.3, columns=len(effects), sharex=True)
    for i, ax in enumerate(axes):
        measure, effect = list(MEASURES)[i // len(effects)], effects[i % len(effects)]
        shown = [verdict for verdict in verdicts if (verdict["effect"], verdict["measure"]) == (effect, measure)]
        for number, verdict in enumerate(shown):
            _draw_effect(ax, verdict, MEASURES[measure][0], MASK_OFFSET * (number - (len(shown) - 1) / 2))
        ax.axhline(0, color="black", lw=0.8)
        if measure == "miou":
            ax.set_title(EFFECTS[effect], fontsize=9)
            for mask in dict.fromkeys(verdict["image_attention"] for verdict in shown):
                if (mask, effect) in of_trained:
                    ax.axhline(100 * of_trained[mask, effect], color=mask_colour(mask), ls=":", lw=1.3)
        if i % len(effects) == 0:
            ax.set_ylabel(MEASURES[measure][1], fontsize=9)
        ax.set_xticks(range(len(ROWS)), list(ROWS))
        ax.set_xlim(-0.5, len(ROWS) - 0.5)
        ax.tick_params(labelsize=8)
    legend = _legend(verdicts, bool(of_trained))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(4, len(legend)), fontsize=8)
    return FigureData(figure, verdict_rows(verdicts))


def _draw_effect(ax: Axes, verdict: dict[str, Any], factor: float, offset: float) -> None:
    """Draw a point with its interval per strength; hollow where the probes have not converged."""
    colour = mask_colour(verdict["image_attention"])
    for row in verdict["estimates"]:
        x = list(ROWS).index(row["row"]) + offset
        ax.plot([x, x], [factor * row["low"], factor * row["high"]], color=colour, lw=1.2)
        fill = colour if row["converged"] else "white"
        ax.plot(x, factor * row["value"], "o", ms=4.5, markeredgecolor=colour, markerfacecolor=fill)


def _legend(verdicts: Verdicts, trained: bool) -> list:
    masks, grey = dict.fromkeys(verdict["image_attention"] for verdict in verdicts), "#444444"
    kinds = []
    if any(verdict["not_converged"] for verdict in verdicts):
        kinds.append(
            Line2D([], [], color=grey, marker="o", ms=4.5, ls="", markerfacecolor="white", label="not converged")
        )
    if trained:
        kinds.append(Line2D([], [], color=grey, ls=":", label="trained with AdamW"))
    return [Patch(color=mask_colour(mask), label=mask) for mask in masks] + kinds


def path_figures(study: Study, verdicts: Verdicts, claims: list[dict[str, Any]]) -> Figures:
    """Yield the figure of solved probes at the chosen strength and its neighbours."""
    if not verdicts:
        return
    claims = [claim for claim in claims if claim["claim"] in EFFECTS]
    of_trained = {(claim["image_attention"], claim["claim"]): claim["value"] for claim in claims}
    of_trained = {key: value for key, value in of_trained.items() if not study.trained[key[0]].is_solved}
    yield ReportFigure(
        "path", "Drop-off and recovery at neighbouring strengths",
        caption(
            "Differences of mIoU and of cross-entropy between sites, with the strength of regularisation that "
            "cross-validation chose for each site, and with all of them one step stronger and one step weaker; above "
            "zero, the first site is better.",
            "Hollow: not converged, not counted." if any(v["not_converged"] for v in verdicts) else "",
            "Dotted: probes trained with AdamW." if of_trained else "",
            "Check whether all three points lie above zero. Bars: 95% intervals that hold at all three together. The "
            "best layer is chosen by cross-validation over images.",
        ),
        path_effects(verdicts, of_trained))  # fmt: skip
