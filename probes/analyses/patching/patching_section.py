"""Figure of activation patching: what replaced states change at other tokens, by layer."""

from probes.analyses.analysis import Section
from probes.analyses.charts import Chart, Curve, Figure, Point, curves_by_layer
from probes.runs.formatting import Rows, bounds
from probes.runs.study import StudyRuns

from . import GROUPS
from .patch import PatchingResults

LOOKS = {  # of the groups of patches that are drawn
    "random": Curve(points=(), name="random tokens", colour="grey", style="dotted"),
    "others": Curve((), "tokens of the object", 0, mark="circle", band=True),
}


def patching_chart(results: PatchingResults, rows: Rows) -> Chart:
    """Return the panel of patching.json; the CSV file has all groups of patches."""
    curves = curves_by_layer(rows, looks=LOOKS, name="patches", value="value")
    layers = sorted({row["layer"] for row in rows})
    ends = [Point(layer, results["total"]["value"]) for layer in (layers[0], layers[-1])]
    return Chart(
        [Curve(points=ends, name="all tokens", colour="ink", style="dashed"), *curves],
        {layer: str(layer) for layer in layers},
        "by layer whose states are replaced",
        "change of log-odds at other patches, nats",
        scale=1,
        signed=True,
    )


def effect_rows(results: PatchingResults) -> Rows:
    """Return the effects of patching.json in nats, one row per group of patches and layer."""
    return [
        {"patches": group, "layer": place["layer"], "value": place["value"]} | bounds(place["ci95"])
        for group in GROUPS
        for place in results.get(group, ())
    ]


def section(study: StudyRuns) -> Section:
    """Return the section of a study: of its solved runs, else of the main ones."""
    runs = {mask: study.solved.get(mask, run) for mask, run in study.main_runs.items()}
    results = {mask: run.analysis("patching.json") for mask, run in runs.items()}
    figures: list[Figure] = []
    for mask, patched in results.items():
        if patched:
            rows = effect_rows(patched)
            shown = Figure(
                name=f"patching_{mask}",
                title=f"Replaced states, {mask}",
                caption=(
                    "Change of the log-odds of the right class at patches whose own states are not replaced, as "
                    f"read at {patched['site'].replace('_', ' ')}, when the states of an object's tokens are "
                    "replaced by another image's at one layer. Look for the layers from which on they change "
                    "nothing elsewhere: by then they have passed on what others take. Exploratory: the paper makes "
                    "no claim about it. Bands: 95% intervals over images, for all layers together."
                ),
                panels=[patching_chart(patched, rows)],
                rows=rows,
            )
            figures.append(shown)
    return Section(figures, by_mask={"patching": results})
