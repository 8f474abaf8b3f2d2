"""Parts of a report, without a page."""

from probes.analyses.charts import Figure
from probes.report.page import study_sections
from probes.runs.read import open_run
from probes.runs.study import StudyRuns, group_runs


def figures_of(study: StudyRuns) -> dict[str, Figure]:
    """Return all figures of a study's analyses by name, in the order of the page."""
    sections = study_sections(study, "")
    return {figure.name: figure for section in sections.values() for figure in section.figures}


def studies_of(paths) -> list[StudyRuns]:
    """Return the studies that runs make; NAME=PATH names the model."""
    runs = []
    for name, separator, path in (str(path).rpartition("=") for path in paths):
        run = open_run(path)
        run.model = name if separator else None
        runs.append(run)
    return group_runs(runs)
