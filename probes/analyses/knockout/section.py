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
    """Return what the claims about knockouts are means over, and shifts of the probe's criterion."""
    if not inference:
        return []
    return [
        "Claims about knockouts are means over classes, look-alikes first averaged with each other, with an interval "
        "over classes: each class counts as much as any other. They cover all images with at least one mistaken patch, "
        "and the later half of the layers.",
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
