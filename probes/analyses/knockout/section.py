"""What the report shows of knockouts: rates by layer. The claims have its effects."""

from probes.analyses.base import Section
from probes.analyses.sinks import describe_sinks
from probes.runs.study import StudyRuns

from .config import cut_layers
from .figures import rates_figure

ABOUT_CLAIMS = (
    "Claims about knockouts are of the later half of the layers: as the paper measures them, the rate of wrong patches "
    "against nothing blocked; elsewhere, the share of the mistaken patches that stay so, against other tokens blocked, "
    "both mistakes of a pair of classes weighed alike. The classes are those that were blocked."
)


def section(study: StudyRuns) -> Section:
    """Return the section of a study: of its main runs."""
    found = {mask: run.analysis("knockout.json") for mask, run in study.main_runs.items()}
    figures = []
    for mask, run in study.main_runs.items():
        if found[mask]:
            figures.append(rates_figure(mask, run))
    sentences = [ABOUT_CLAIMS] if figures else []
    for mask, results in found.items():
        if results and (text := describe_sinks(cut_layers(results), results["sinks"])):
            sentences.append(f"{mask.capitalize()}: {text[0].lower()}{text[1:]}.")
    return Section(figures, sentences, by_mask={"knockout": found})
