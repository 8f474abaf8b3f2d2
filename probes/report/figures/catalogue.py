"""Figures of a study, in the order of the page; titles and captions are in the files that draw them."""

from typing import Any

from probes.report.answers import answers_by_mask
from probes.report.study import Study

from .answers import answer_figures
from .claims import claim_figures
from .confusion import confusion_figures
from .feature_statistics import statistics_figures
from .knockout import knockout_figures
from .knockout_controls import control_figures
from .layer_curves import layer_figures
from .maps import map_figures
from .mask_comparison import mask_figures
from .patching import patching_figures
from .path import path_figures
from .starvation import starvation_figures
from .style import Figures


def study_figures(study: Study, results: dict[str, Any]) -> Figures:
    """Yield all figures of a study, in the order of the page; `results` is its part of results.json."""
    yield from layer_figures(study)
    yield from claim_figures(results["claims"])
    yield from mask_figures(results["paired"])
    if results["starvation"]:
        yield from starvation_figures(results["starvation"], study.starvation_analysis())
    yield from knockout_figures(study, results["knockout_inference"])
    for mask, run in study.trained.items():
        yield from control_figures(mask, run)
    yield from answer_figures(answers_by_mask(results))
    yield from patching_figures({mask: entry["patching"] for mask, entry in results["masks"].items()})
    yield from confusion_figures(study.trained, results["confusion"])
    yield from map_figures(study)
    yield from path_figures(study, results)
    yield from statistics_figures(study)
