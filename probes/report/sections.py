"""The sections of a study's page, in its order: the report's own, and those of the analyses (probes/analyses/)."""

from typing import Any, NamedTuple

from probes.analyses import ANALYSES
from probes.analyses.base import Section, function_of
from probes.results.study import Study

from .figures.claims import claim_figures
from .figures.layer_curves import layer_figures
from .figures.mask_comparison import mask_figures
from .mask_comparison import compare_masks
from .path import sites_at_edge
from .summary_text import edge_notes, summarize_mask_comparison
from .tables import claim_rows, class_rows, mask_comparison_rows


class PageSection(NamedTuple):
    """A section of the page."""

    title: str
    question: str
    content: Section


def study_sections(study: Study, claims: list[dict[str, Any]]) -> list[PageSection]:
    """Return all sections of a study; those without data have no figures."""
    at_edge = {mask: sites_at_edge(run) for mask, run in study.solved.items()}
    tables, results = {"classes": class_rows(study)}, {"path_at_edge": at_edge}
    layers = Section([*layer_figures(study)], edge_notes(at_edge), tables, results=results)
    controls = Section([*claim_figures(claims)], tables={"claims": claim_rows(claims)})
    return [
        PageSection("Drop-off and recovery", "Where does the model lose what it sees, and where is it back?", layers),
        PageSection("Claims beside controls", "What do models with random weights show as well?", controls),
        PageSection(
            "Bidirectional vs. causal attention", "At which layers do the two masks differ?", _masks_section(study)
        ),
        *(
            PageSection(analysis.title, analysis.question, function_of(name, "section")(study))
            for name, analysis in ANALYSES.items()
            if analysis.title
        ),
    ]


def _masks_section(study: Study) -> Section:
    compared = compare_masks(study)
    if not compared:
        return Section(results={"paired": None})
    tables = {"paired": mask_comparison_rows(compared)}
    sentences = summarize_mask_comparison(compared)
    return Section([*mask_figures(compared)], sentences, tables, results={"paired": compared})
