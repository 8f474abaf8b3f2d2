"""What the report shows of starvation: the gap of a study's two runs, and more of `probes starvation`."""

import logging
import math
from typing import Any

from probes.analyses.base import Section
from probes.analyses.sinks import starts_with_sink
from probes.runs.formatting import Rows, format_percent, format_points
from probes.runs.paper import PAPER
from probes.runs.probe_run import ProbeRun
from probes.runs.study import StudyRuns

from . import sink_warning
from .figures import starvation_figures
from .run import shared_layer, starvation

log = logging.getLogger(__name__)


def section(study: StudyRuns) -> Section:
    """Return the section of a study; empty without both runs or the causal run's best layer."""
    pair = study.pair()
    if not pair or not shared_layer(*pair):
        return Section(results={"starvation": None})
    result = starvation(*pair)
    rows = table3(result)
    texts = [
        {key: row[key] if key == "model" else str(row[key]) for key in ("model", "patch")}
        | {key: format_percent(row[key]) for key in ("causal", "bidirectional")}
        | {"gap": format_points(row["gap"])}
        for row in rows
    ]
    shown = {"Table 3: accuracy at the first patches, in percent": texts}
    analysis = further_analyses(*pair)
    if rows_of_sinks := sink_rows(analysis):
        shown[f"Attention sinks. {sink_warning(analysis)}"] = rows_of_sinks
    figures = [*starvation_figures(result, analysis)]
    return Section(
        figures,
        tables={"table3": rows},
        shown=shown,
        results={"starvation": result},
    )


def further_analyses(causal: ProbeRun, bidirectional: ProbeRun) -> dict[str, Any] | None:
    """Return the results of `probes starvation` on the two runs; None without, or of another causal run."""
    found = bidirectional.analysis("starvation.json")
    if found and causal.fingerprint not in found["runs"]:
        text = "%s is left out, since it compares with another run than %s; run `probes starvation` on both again"
        log.warning(text, bidirectional.path / "starvation.json", causal.path)
        return None
    return found


def sink_rows(analysis: dict[str, Any] | None) -> list[dict[str, str]]:
    """Return a row of text for each layer at which the first image token is a sink, by mask."""
    rows = []
    for mask, measured in (analysis or {}).get("sinks", {}).items():
        for layer in measured["layers"]:
            if not starts_with_sink(layer):
                continue
            row = {
                "attention": mask,
                "site": layer["site"],
                "norm of the first image token, in medians": f"{layer['first_norm']:.3g}",
                "image tokens with such a norm": f"{layer['sinks']:.3g}",
            }
            rows.append(row)
    return rows


def table3(starvation: dict[str, Any]) -> Rows:
    """Return Table 3 (accuracy at the first three patches): rows of the runs, then of the paper."""
    keys = ("causal", "bidirectional", "gap")
    paper = PAPER["table3_patch_accuracy"]

    def number(x):
        return None if math.isnan(x) else x  # a patch without a labelled pixel

    rows = [
        {"model": "this run", "patch": i} | {key: number(starvation[key][i]) for key in keys}
        for i in range(3)
    ]
    return rows + [
        {"model": "paper, clip, ADE20K", "patch": i}
        | dict(zip(keys, paper[f"patch_{i}"], strict=False))
        for i in range(3)
    ]
