"""What the report shows of predicted maps."""

from collections.abc import Iterator

from probes.analyses.base import Section
from probes.analyses.charts import Figure
from probes.data.palette import palette_of
from probes.runs.formatting import file_name
from probes.runs.study import StudyRuns

from .figures import knockout_columns, knockout_rows, shown_sites, site_rows


def section(study: StudyRuns) -> Section:
    """Return the section of a study."""
    return Section([*map_figures(study)])


def map_figures(study: StudyRuns) -> Iterator[Figure]:
    """Yield the maps of a study's runs; they need the dataset."""
    if not any(run.analysis("maps.json") for run in study.main_runs.values()):
        return
    palette = palette_of(study.first.dataset())
    for mask, run in study.main_runs.items():
        if not (result := run.analysis("maps.json")):
            continue
        sites = shown_sites(run)
        yield Figure(
            f"maps_{mask}",
            f"Predictions by layer, {mask}" if run.has_llm else "Predictions by layer",
            "Look for the layer from which on objects are found, and for confusions that appear and disappear over the "
            "layers (Figs. 4 and 13).",
            columns=["image", "target", *(site.replace("_", " ") for site in sites)],
            pictures=site_rows(run, sites, palette),
        )
        for case in result["knockout"]:
            how = f" ({case['how']})" if case.get("how") else ""
            wrong, correct = case["class"], case["correct_class"]
            yield Figure(
                f"knockout_maps_{mask}_{file_name(wrong)}",
                f"{correct} predicted as {wrong}, {mask}",
                f"The image with the most patches wrongly predicted as {wrong!r} that also has patches correctly "
                f"predicted as {correct!r}, by layer (Figs. 6 and 12). Rows: no blocking, wrong class blocked, correct "
                f"class blocked{how}.",
                columns=knockout_columns(run, wrong),
                pictures=knockout_rows(run, wrong, palette),
            )
