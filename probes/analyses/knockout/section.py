"""What the report shows of knockouts: rates, effects by class, criterion shifts, and effects against controls."""

from typing import Any

from probes.analyses.base import Section
from probes.results.study import Study

from .control_figures import control_figures
from .figures import knockout_figures
from .inference import knockout_inference
from .tables import knockout_tables


def section(study: Study) -> Section:
    """Return the section of a study: of its main runs."""
    runs = study.trained
    inference = {mask: result for mask, run in runs.items() if (result := knockout_inference(run))}
    figures = [*knockout_figures(runs, inference)]
    for mask, run in runs.items():
        figures += control_figures(mask, run)
    return Section(
        figures,
        sentences(inference),
        knockout_tables(inference),
        results={"knockout_inference": inference},
        by_mask={"knockout": {mask: run.analysis("knockout.json") for mask, run in runs.items()}},
    )


def sentences(inference: dict[str, dict[str, Any]]) -> list[str]:
    """Return what the claims about knockouts are about, and shifts of the probe's criterion."""
    if not inference:
        return []
    return [
        "Claims about knockouts are of the later half of the layers: as the paper measures them, the rate of wrong "
        "patches against nothing blocked; elsewhere, the share of the mistaken patches that stay so, against other "
        "tokens blocked, both mistakes of a pair of classes weighed alike. The classes are those that were blocked; "
        "the spread over them is in results.json.",
        *shift_sentences(inference),
    ]


def shift_sentences(inference: dict[str, dict[str, Any]]) -> list[str]:
    """Return a sentence per mask about pairs of classes in which hiding either one moves the read-out the same way."""
    return [
        f"Criterion shift, {mask}: hiding either class moves the read-out towards "
        + ", ".join(f"{entry['towards']} in {' / '.join(entry['classes'])}" for entry in shifted)
        + "; there the effects are no evidence for anchors."
        for mask, result in inference.items()
        if (shifted := [entry for entry in result["criterion_shifts"] or [] if entry["shift"]])
    ]
