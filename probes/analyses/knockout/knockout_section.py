"""What the report shows of knockouts: rates by layer. The claims have its effects."""

from probes.analyses.analysis import Section
from probes.analyses.charts import Chart, Curve, Figure, curves_by_layer
from probes.analyses.sinks import describe_sinks, sinks_of
from probes.runs.formatting import Rows, bounds
from probes.runs.read import ProbeRun
from probes.runs.study import StudyRuns

from .knockout_effects import Rates

ABOUT_CLAIMS = (
    "Claims about knockouts are of the later half of the layers: as the paper measures them, the rate of wrong patches "
    "against nothing blocked; elsewhere, the share of the mistaken patches that stay so, against other tokens blocked, "
    "both mistakes of a pair of classes weighed alike. The classes are those that were blocked."
)


def section(study: StudyRuns) -> Section:
    """Return the section of a study: of its main runs."""
    results_by_mask = {mask: run.analysis("knockout.json") for mask, run in study.main_runs.items()}
    figures = []
    sentences = []
    for mask, run in study.main_runs.items():
        if results := results_by_mask[mask]:
            figures.append(rates_figure(mask, run))
            sentences.append(describe_sinks(mask, sinks_of(run), results["options"]["layers"]))
    if figures:
        sentences.insert(0, ABOUT_CLAIMS)
    by_mask = {"knockout": results_by_mask}
    return Section(figures, [*filter(None, sentences)], by_mask=by_mask)


LOOKS = {  # of the conditions; the first ones are below
    "random_incorrect": Curve(
        points=(), name="as many other tokens", colour="grey", style="dotted"
    ),
    "random_correct": Curve(points=(), name="as many other tokens", colour="grey", style="dotted"),
    "none": Curve((), "nothing blocked", "ink"),
    "incorrect": Curve((), "tokens of the wrong class", 1, band=True),
    "correct": Curve((), "tokens of the right class", 0, band=True),
}


def rate_chart(rows: Rows) -> Chart:
    """Return the panel of a class: wrong patches left by layer and condition."""
    curves = curves_by_layer(rows, looks=LOOKS, name="condition", value="remaining")
    ticks = {row["layer"]: str(row["layer"] or "ad") for row in rows}
    return Chart(
        curves=curves,
        ticks=ticks,
        title=f"{rows[0]['class']}, {rows[0]['cases']} cases",
        unit="wrong patches left, %",
    )


def _rate_rows(run: ProbeRun, entry: Rates) -> Rows:
    """Return n_c(l) / n_c(0) of an entry of knockout.json, by condition and layer."""
    rows = []
    for condition, rates in entry["remaining"].items():
        for layer, remaining in enumerate(rates):
            row = {
                "image_attention": run.mask,
                "class": entry["class"],
                "condition": condition,
                "layer": layer,
                "cases": entry["images"],
                "remaining": remaining,
            }
            rows.append(row | bounds(entry["ci95"][condition][layer]))
    return rows


def rates_figure(mask: str, run: ProbeRun) -> Figure:
    """Return the figure of the paper's knockout of a run."""
    results = run.analysis("knockout.json")
    entries = [results["all"], *results["classes"]]
    by_class = [rows for entry in entries if (rows := _rate_rows(run, entry))]
    return Figure(
        name=f"knockout_{mask}",
        title=f"Wrong patches left, {mask}",
        caption=(
            "Patches that the adapter's probe calls a class by mistake, and the share still wrong at each layer "
            "(Fig. 11) while the LLM's image tokens cannot attend to some of them. Bands: 95% intervals over images."
        ),
        panels=[rate_chart(rows) for rows in by_class],
        rows=[row for rows in by_class for row in rows],
    )
