"""Parts of a report, without a page or without pictures."""

import base64

from matplotlib.figure import Figure

from probes.analyses.style import ReportFigure
from probes.report.claims import evaluate_claims
from probes.report.sections import study_sections
from probes.runs.runs import open_run
from probes.runs.study import StudyRuns, group_runs

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def draw_no_pictures(monkeypatch) -> None:
    """Save a grey pixel for each figure."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **options: file.write(PIXEL))


def figures_of(study: StudyRuns) -> dict[str, ReportFigure]:
    """Return all figures of a study by name, in the order of the page."""
    sections = study_sections(study, evaluate_claims(study))
    return {figure.name: figure for section in sections for figure in section.content.figures}


def studies_of(paths) -> list[StudyRuns]:
    """Return the studies that runs make; NAME=PATH names the model."""
    runs = []
    for name, separator, path in (str(path).rpartition("=") for path in paths):
        run = open_run(path)
        run.model = name if separator else None
        runs.append(run)
    return group_runs(runs)
