"""The figure of mIoU inside the layers: values, attention output and MLP output, beside the output of each layer."""

from probes.analyses.style import (
    COLOURS,
    FigureData,
    Figures,
    ReportFigure,
    curves,
    new_panels,
)
from probes.models.sites import is_layer, layer_around, layer_number, part_of
from probes.runs.formatting import Rows
from probes.runs.probe_run import ProbeRun
from probes.runs.study import StudyRuns

from .layer_curves import MIOU, TRAINED, score_rows

# name and marker of each curve
CURVES = {
    "value": ("values", "^"),
    "attn": ("added by attention", "s"),
    "mlp": ("added by the MLP", "D"),
    "layer": ("output of the layer", "o"),
}


def part_figures(study: StudyRuns) -> Figures:
    """Yield the scores inside the layers, if any of them was probed."""
    runs = {mask: run for mask, run in study.main_runs.items() if any(map(part_of, run.sites))}
    if runs:
        yield ReportFigure(
            "parts", "Inside the layers",
            "mIoU of the probe at the values that a layer's attention reads, and at what its attention and its MLP "
            "add to the residual stream, beside the output of the layer. Values can be narrower than the other sites. "
            "Bands: 95% intervals.",
            part_curves(runs))  # fmt: skip


def part_curves(runs: dict[str, ProbeRun]) -> FigureData:
    """Draw mIoU by layer, one panel per mask and one curve per part, with intervals."""
    figure, axes = new_panels(
        len(runs),
        height=3.4,
        columns=2,
        sharey=True,
    )
    looks = {}
    for (name, marker), colour in zip(CURVES.values(), COLOURS, strict=False):
        looks[name] = TRAINED | {"color": colour, "marker": marker}
    for ax, (mask, run) in zip(axes, runs.items(), strict=True):
        curves(ax, _points(run), looks, **MIOU)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("layer")
        if len(runs) > 1:
            ax.set_title(mask, fontsize=10)
    axes[0].set_ylabel("mIoU (%)")
    axes[0].legend(fontsize=8)
    return FigureData(figure, score_rows(runs.values()))


def _points(run: ProbeRun) -> Rows:
    """Return the points of a run at layers and their parts, in the order of the layers."""
    rows = [row for row in score_rows([run]) if is_layer(layer_around(row["site"]))]
    points = []
    for row in sorted(rows, key=lambda row: layer_number(row["site"])):
        name, _ = CURVES[part_of(row["site"]) or "layer"]
        points.append(row | {"curve": name, "depth": layer_number(row["site"])})
    return points
