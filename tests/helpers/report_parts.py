"""Parts of a report, without a page."""

from probes.analyses.style import ReportFigure
from probes.report.claims import evaluate_claims
from probes.report.sections import study_sections
from probes.results.study import Study


def figures_of(study: Study) -> dict[str, ReportFigure]:
    """Return all figures of a study by name, in the order of the page."""
    sections = study_sections(study, evaluate_claims(study))
    return {figure.name: figure for section in sections for figure in section.content.figures}
