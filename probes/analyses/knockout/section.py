"""What the report shows of knockouts: rates by layer. The claims have its effects."""

from probes.analyses.base import Section
from probes.analyses.sinks import describe_sinks, sinks_of
from probes.runs.study import StudyRuns

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
    sentences = []
    for mask, run in study.main_runs.items():
        if results := found[mask]:
            figures.append(rates_figure(mask, run))
            sentences.append(describe_sinks(mask, sinks_of(run), results["options"]["layers"]))
    about = [ABOUT_CLAIMS] if figures else []
    return Section(figures, [*about, *filter(None, sentences)], by_mask={"knockout": found})
