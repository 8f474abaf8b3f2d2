"""The sections of a study's page, in its order: the report's own, and those of the analyses (probes/analyses/)."""

from typing import NamedTuple

from probes.analyses import ANALYSES
from probes.analyses.base import Section, function_of
from probes.runs.formatting import Entry, Rows
from probes.runs.study import StudyRuns

from .encoder_layers import best_layer, describe_best_layer
from .figures.claims import claim_figures
from .figures.layer_curves import encoder_figures, layer_figures, stack_figures
from .figures.layer_parts import part_figures
from .strengths import edge_notes


class PageSection(NamedTuple):
    """A section of the page."""

    title: str
    question: str
    content: Section


def study_sections(study: StudyRuns, claims: list[Entry]) -> list[PageSection]:
    """Return all sections of a study; those without data have no figures."""
    at_edge = {mask: run.strengths.at_edge() for mask, run in study.solved.items()}
    tables: dict[str, Rows] = {}
    results = {"path_at_edge": at_edge}
    layers = _layers_section(study, claims, edge_notes(at_edge), tables, results)
    controls = Section([*claim_figures(claims, study.first.has_llm)])
    return [
        layers,
        PageSection(
            "Claims beside controls", "What do models with random weights show as well?", controls
        ),
        *(
            PageSection(analysis.title, analysis.question, function_of(name, "section")(study))
            for name, analysis in ANALYSES.items()
            if analysis.title
        ),
    ]


def _layers_section(
    study: StudyRuns,
    claims: list[Entry],
    notes: list[str],
    tables: dict[str, Rows],
    results: Entry,
) -> PageSection:
    """Return the section of the scores by layer: of an MLLM, or of a bare encoder."""
    if study.first.has_llm:
        question = "Where does the model lose what it sees, and where is it back?"
        figures = [*layer_figures(study), *stack_figures(study), *part_figures(study)]
        content = Section(figures, notes, tables, results=results)
        return PageSection("Layer by layer", question, content)
    best = best_layer(study.first, claims)
    sentences = [f"{describe_best_layer(best)}.", *notes] if best else notes
    results = results | {"best_layer": best}
    figures = [*encoder_figures(study), *part_figures(study)]
    return PageSection(
        "Layer by layer",
        "Which layer reads best, and for which class?",
        Section(figures, sentences, tables, results=results),
    )
