"""Figure of the attention knockout: wrong patches left by layer (Fig. 11)."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from llava_bidir.common.bootstrap import interval
from probes.analyses.style import FigureData, ReportFigure, draw_curve, new_panels
from probes.results.formatting import Rows, bounds
from probes.results.probe_run import ProbeRun

from .rates import read_knockout, select_cases

CONDITION_STYLES = {
    "none": ("#444444", "-", "no blocking"),
    "incorrect": ("#CC3311", "-", "wrong class blocked"),
    "correct": ("#0072B2", "-", "correct class blocked"),
    "random_incorrect": ("#EE9988", ":", "as many random patches (wrong)"),
    "random_correct": ("#77BBDD", ":", "as many random patches (correct)"),
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


def rates_figure(mask: str, run: ProbeRun) -> ReportFigure:
    """Return the figure of the paper's knockout of a run."""
    return ReportFigure(
        f"knockout_{mask}", f"Wrong patches left, {mask}",
        "Share of the adapter's wrong patches still wrong at each layer, over all images, and by wrongly predicted "
        "class (Fig. 11). The paper expects red (wrong class blocked) below grey (no blocking) and blue (correct class "
        "blocked) above it. Dotted: as many random patches blocked. Bands: 95% intervals over images.",
        wrong_patches_left(run), "wide",)  # fmt: skip
