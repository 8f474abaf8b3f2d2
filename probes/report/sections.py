"""The sections of a study's page, in its order: the report's own, and those of the analyses (probes/analyses/)."""

from typing import Any, NamedTuple

from probes.analyses import ANALYSES
from probes.analyses.base import Section, function_of
from probes.results.formatting import format_interval, format_p, format_points
from probes.results.study import Study

from .confusion import most_confused_pairs
from .figures.claims import claim_figures
from .figures.confusion import confusion_figures
from .figures.feature_statistics import statistics_figures
from .figures.layer_curves import layer_figures
from .figures.mask_comparison import mask_figures
from .figures.path import path_figures
from .mask_comparison import compare_masks
from .path import path_verdicts, sites_at_edge
from .summary_text import summarize_mask_comparison, summarize_path
from .tables import claim_rows, class_rows, mask_comparison_rows


class PageSection(NamedTuple):
    """A section of the page."""

    title: str
    question: str
    content: Section


def study_sections(study: Study, claims: list[dict[str, Any]]) -> list[PageSection]:
    """Return all sections of a study; those without data have no figures."""
    layers = Section([*layer_figures(study)], tables={"classes": class_rows(study)})
    controls = Section([*claim_figures(claims)], tables={"claims": claim_rows(claims)})
    pairs = {mask: found for mask, run in study.trained.items() if (found := most_confused_pairs(run))}
    confusion = Section([*confusion_figures(study.trained, pairs)], results={"confusion": pairs})
    states = Section([*statistics_figures(study)])
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
        PageSection(
            "Confused classes by layer", "Which classes are mistaken for each other, and up to which layer?", confusion
        ),
        PageSection(
            "Probes at neighbouring strengths of regularisation",
            "Do drop and recovery depend on how strongly the probes are regularised?",
            _path_section(study, claims),
        ),
        PageSection("Hidden-state statistics", "How do the states themselves change, without any probe?", states),
    ]


def _masks_section(study: Study) -> Section:
    compared = compare_masks(study)
    if not compared:
        return Section(results={"paired": None})
    rows = [
        {"site": entry["site"], "difference": format_points(entry["difference"], 2)}
        | {"95% interval": format_interval(entry["ci95"], 2)}
        | {"p": format_p(entry["p"]), "corrected p": format_p(entry["p_corrected"])}
        for entry in compared["sites"]
    ]
    tables = {"paired": mask_comparison_rows(compared)}
    sentences = summarize_mask_comparison(compared)
    return Section([*mask_figures(compared)], sentences, tables, {"All sites": rows}, {"paired": compared})


def _path_section(study: Study, claims: list[dict[str, Any]]) -> Section:
    verdicts = path_verdicts(study)
    at_edge = {mask: sites_at_edge(run) for mask, run in study.solved.items()}
    figures, sentences = [*path_figures(study, verdicts, claims)], summarize_path(verdicts, at_edge)
    return Section(figures, sentences, results={"path": verdicts, "path_at_edge": at_edge})
