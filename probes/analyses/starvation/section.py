"""What the report shows of starvation: the gap of a study's two runs, and attention sinks."""

import math
from collections.abc import Mapping
from typing import Any

from probes.analyses.base import Section
from probes.analyses.sinks import sinks_of
from probes.runs.finished_run import FinishedRun
from probes.runs.formatting import Rows
from probes.runs.paper import PAPER
from probes.runs.study import StudyRuns

from . import first_token_sinks, sink_warning
from .figures import starvation_figures
from .gaps import starvation


def section(study: StudyRuns) -> Section:
    """Return the section of a study; empty without both runs or the causal run's best layer."""
    pair = study.pair()
    result = starvation(*pair) if pair else None
    if result is None:
        return Section(results={"starvation": None})
    rows = table3(result)
    shown = {}
    runs = {run.mask: run for run in pair}
    if rows_of_sinks := sink_rows(runs):
        shown[f"Attention sinks. {sink_warning(runs, result['site'])}"] = rows_of_sinks
    return Section(
        [*starvation_figures(result)],
        tables={"table3": rows},
        shown=shown,
        results={"starvation": result},
    )


def sink_rows(runs: Mapping[str, FinishedRun]) -> list[dict[str, str]]:
    """Return a row of text for each layer at which the first image token is a sink, of runs by mask."""
    return [
        {
            "attention": mask,
            "site": layer["site"],
            "norm of the first image token, in medians": f"{layer['first_norm']:.3g}",
            "image tokens with such a norm": f"{layer['sinks']:.3g}",
        }
        for mask, run in runs.items()
        for layer in first_token_sinks(sinks_of(run))
    ]


def table3(starvation: dict[str, Any]) -> Rows:
    """Return Table 3 (accuracy at the first three patches): rows of the runs, then of the paper."""
    keys = ("causal", "bidirectional", "gap")
    paper = PAPER["table3_patch_accuracy"]

    def number(x):
        return None if math.isnan(x) else x  # a patch without a labelled pixel

    rows = [
        {
            "model": "this run",
            "patch": i,
        }
        | {key: number(starvation[key][i]) for key in keys}
        for i in range(3)
    ]
    return rows + [
        {
            "model": "paper, clip, ADE20K",
            "patch": i,
        }
        | dict(zip(keys, paper[f"patch_{i}"], strict=False))
        for i in range(3)
    ]
