"""What the report shows of predicted maps."""

from probes.analyses.base import Section
from probes.analyses.style import Figures, ReportFigure
from probes.data.palette import palette_of
from probes.runs.formatting import file_name
from probes.runs.study import StudyRuns

from .figures import knockout_maps, site_maps


def section(study: StudyRuns) -> Section:
    """Return the section of a study."""
    return Section([*map_figures(study)])


def map_figures(study: StudyRuns) -> Figures:
    """Yield the maps of a study's runs; they need the dataset."""
    if not any(run.analysis("maps.json") for run in study.main_runs.values()):
        return
    palette = palette_of(study.first.dataset())
    for mask, run in study.main_runs.items():
        if not (result := run.analysis("maps.json")):
            continue
        of_encoder = (
            "Predictions by layer. Look for the layer from which on objects are found, "
            "and for what the last ones lose."
        )
        of_mllm = (
            "Predictions from the encoder to the best layer (Figs. 4 and 13). Look for confusions that appear at the "
            "adapter and disappear over the layers."
        )
        title = f"Predictions by layer, {mask}" if run.has_llm else "Predictions by layer"
        text = of_mllm if run.has_llm else of_encoder
        yield ReportFigure(
            f"maps_{mask}",
            title,
            text,
            site_maps(run, palette),
            "wide",
        )
        for case in result["knockout"]:
            wrong = case["class"]
            correct = case["correct_class"]
            how = f" ({case['how']})" if case.get("how") else ""
            yield ReportFigure(
                f"knockout_maps_{mask}_{file_name(wrong)}", f"{correct} predicted as {wrong}, {mask}",
                f"The image with the most patches wrongly predicted as {wrong!r} that also has patches correctly "
                f"predicted as {correct!r}, by layer (Figs. 6 and 12). Rows: no blocking, wrong class blocked, correct "
                f"class blocked{how}.",
                knockout_maps(run, wrong, palette), "wide",)  # fmt: skip
