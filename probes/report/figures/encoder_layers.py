"""Figure of mIoU by layer of a bare vision encoder, beside random encoders."""

from collections.abc import Iterable

from matplotlib.axes import Axes

from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    caption,
    label_layers,
    new_axes,
    score_rows,
    site_depth,
)
from probes.models.sites import FINAL_NORM
from probes.results.probe_run import ProbeRun
from probes.results.study import StudyRuns

from .layer_curves import depth_and_miou, draw_miou, with_depth

TRAINED = COLOURS[0]
CONTROLS = {"random": ("D", "random layers"), "random, unmatched": ("^", "untrained layers")}
CONTROLS |= {"permuted": ("s", "permuted weights")}


def encoder_figures(study: StudyRuns) -> Figures:
    """Yield the scores by layer of a bare encoder."""
    controls = {run.arm for run in _controls(study)}
    yield ReportFigure(
        "layers",
        "Segmentation quality by layer",
        caption(
            "mIoU of the probe at each layer; layer 0 are the patch embeddings. Dashed: the best layer.",
            "Star: the last layer after the model's norm."
            if FINAL_NORM in study.first.sites
            else "",
            "Diamonds: random layers that change the states as much as the trained ones; what they reach as well "
            "need not be learned."
            if "random" in controls
            else "",
            "Squares: the trained weights in random order." if "permuted" in controls else "",
            "Band: 95% intervals.",
        ),
        encoder_curve(study),
    )


def encoder_curve(study: StudyRuns) -> FigureData:
    """Draw mIoU by layer of the trained encoder with its interval, and of random ones."""
    run = study.first
    controls = _controls(study)
    figure, ax = new_axes(6.4, 3.9)
    draw_miou(
        ax,
        run,
        TRAINED,
        style="-o",
        ms=4,
        label="trained",
    )
    _mark_best(ax, run)
    labelled: set[str] = set()
    for control in controls:
        marker, label = CONTROLS[control.arm]
        shown = None if label in labelled else label
        labelled.add(label)
        depth, miou = depth_and_miou(control.metrics["sites"])
        ax.plot(
            depth,
            miou,
            marker,
            color="#444444",
            mfc="none",
            ms=5,
            alpha=0.8,
            label=shown,
        )
    label_layers(ax, [entry["site"] for entry in with_depth(run.metrics["sites"])])
    ax.set_ylabel("mIoU (%)")
    ax.legend(fontsize=9)
    return FigureData(figure, score_rows([run, *controls]))


def _mark_best(ax: Axes, run: ProbeRun) -> None:
    miou = {entry["site"]: 100 * entry["miou"] for entry in run.metrics["sites"]}
    if run.peak_layer:
        depth = site_depth(run.peak_layer)
        ax.axvline(
            depth,
            color=TRAINED,
            ls="--",
            lw=0.9,
            alpha=0.7,
        )
        at = (depth, miou[run.peak_layer])
        ax.annotate(
            f"{at[1]:.1f}",
            at,
            (4, 5),
            color=TRAINED,
            textcoords="offset points",
            fontsize=9,
        )
    if FINAL_NORM in miou:
        last = max(site_depth(site) for site in miou if site != FINAL_NORM) if len(miou) > 1 else 0
        ax.plot(
            [last],
            [miou[FINAL_NORM]],
            "*",
            color=TRAINED,
            ms=9,
            mfc="none",
            label="final norm",
        )


def _controls(study: StudyRuns) -> list[ProbeRun]:
    """Return the random encoders with the kind of probes of the trained one."""
    members: Iterable[ProbeRun] = study.members
    return [
        run for run in members if run.arm in CONTROLS and run.is_solved == study.first.is_solved
    ]
