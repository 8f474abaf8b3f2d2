"""Figure of the attention knockout: wrong patches left by layer (Fig. 11)."""

from typing import Any

from probes.analyses.style import FigureData, ReportFigure, curves, new_panels
from probes.runs.formatting import Rows, bounds
from probes.runs.probe_run import ProbeRun

LOOKS = {  # of the conditions
    "none": {
        "color": "#444444",
        "label": "no blocking",
        "band": True,
    },
    "incorrect": {
        "color": "#CC3311",
        "label": "wrong class blocked",
        "band": True,
    },
    "correct": {
        "color": "#0072B2",
        "label": "correct class blocked",
        "band": True,
    },
    "random_incorrect": {
        "color": "#EE9988",
        "label": "as many random patches (wrong)",
        "ls": ":",
    },
    "random_correct": {
        "color": "#77BBDD",
        "label": "as many random patches (correct)",
        "ls": ":",
    },
}


def wrong_patches_left(run: ProbeRun) -> FigureData:
    """Draw the wrong patches left per layer and condition, over all classes and by class (Fig. 11)."""
    results = run.analysis("knockout.json")
    entries = [results["all"], *results["classes"]]
    figure, axes = new_panels(
        len(entries),
        height=1.9,
        columns=4,
        sharex=True,
    )
    rows = []
    for ax, entry in zip(axes, entries, strict=True):
        of_class = _rate_rows(run, entry)
        curves(
            ax,
            of_class,
            LOOKS,
            x="layer",
            y="remaining",
            by="condition",
            scale=100,
        )
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.tick_params(labelsize=7)
        name = "all classes" if entry is results["all"] else entry["class"]
        ax.set_title(f"{name} ({entry['images']} cases)", fontsize=8)
        rows += of_class
    figure.supylabel("wrong patches left (%)", fontsize=9)
    figure.supxlabel("LLM layer (0 = adapter)", fontsize=9)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        fontsize=8,
    )
    return FigureData(figure, rows)


def _rate_rows(run: ProbeRun, entry: dict[str, Any]) -> Rows:
    """Return n_c(l) / n_c(0) of an entry of knockout.json, by condition and layer."""
    return [
        {
            "image_attention": run.mask,
            "class": entry["class"],
            "condition": condition,
            "layer": layer,
            "cases": entry["images"],
            "remaining": remaining,
        }
        | bounds(entry["ci95"][condition][layer])
        for condition, rates in entry["remaining"].items()
        for layer, remaining in enumerate(rates)
    ]


def rates_figure(mask: str, run: ProbeRun) -> ReportFigure:
    """Return the figure of the paper's knockout of a run."""
    return ReportFigure(
        f"knockout_{mask}", f"Wrong patches left, {mask}",
        "Share of the adapter's wrong patches still wrong at each layer, over all images, and by wrongly predicted "
        "class (Fig. 11). The paper expects red (wrong class blocked) below grey (no blocking) and blue (correct class "
        "blocked) above it. Dotted: as many random patches blocked. Bands: 95% intervals over images.",
        wrong_patches_left(run), "wide",)  # fmt: skip
