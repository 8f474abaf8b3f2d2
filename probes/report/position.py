"""Position alone beside the sites: what a probe scores that never sees the picture (probes/analyses/position.py)."""

from collections.abc import Iterator, Sequence
from typing import Any

from pandas import DataFrame

from probes.analyses.charts import Curve, Point
from probes.runs.formatting import Entry, bounds
from probes.runs.study import StudyRuns
from probes.tasks import TASKS

from .sites import run_columns, shown_runs

NAME = "position alone"
TINY = 1e-12


def position_rows(study: StudyRuns, key: str) -> Iterator[Entry]:
    """Yield a row for each score of each main run; see :class:`probes.report.tables.Tables`."""
    task = study.task
    for mask, run in shown_runs(study).items():
        results = study.solved.get(mask, run).analysis("position.json")
        if results is None:
            continue
        best = max(run.metrics["sites"], key=lambda entry: task.sign * entry[task.score])
        scores = results["scores"]
        for metric, is_higher in task.scores.items():
            value = scores[metric]
            part, whole = value, best[metric]
            if not is_higher:
                part, whole = whole, part
            yield {
                **run_columns(study, run, key),
                "grid": "x".join(map(str, results["grid"])),
                "metric": metric,
                "value": value,
                **bounds(scores[f"{metric}_ci95"]),
                "site": best["site"],
                "best": best[metric],
                "share": part / max(whole, TINY),
                "converged": results["converged"],
            }


def main_rows(table: DataFrame) -> DataFrame:
    """Return the rows of the main score of each task."""
    is_main = table["metric"] == table["task"].map(lambda task: TASKS[task].score)
    return table[is_main]


def position_results(table: DataFrame, labels: dict[str, str]) -> Entry:
    """Return results.json["position"]: by task, data set and grid, the scores, and the share of each model's best one.

    Args:
        table: Of position alone.
        labels: Of models by key.
    """
    results: Entry = {}
    for row in table.itertuples():
        of_data = results.setdefault(row.task, {}).setdefault(row.data, {})
        entry = of_data.setdefault(row.grid, {"models": []})
        entry |= {row.metric: row.value, f"{row.metric}_ci95": [row.low, row.high]}
        entry["converged"] = row.converged
    for row in main_rows(table).itertuples():
        of_model = {"model": labels[row.model], "image_attention": row.mask, "site": row.site}
        of_model |= {"best": row.best, "share": row.share}
        results[row.task][row.data][row.grid]["models"].append(of_model)
    return results


def position_curves(rows: Sequence[Any], last: float) -> list[Curve]:
    """Return a dashed line from place 0 to the last one for each grid of some main rows."""
    by_grid = {row.grid: row for row in rows}
    curves = []
    for grid, row in by_grid.items():
        name = NAME
        if len(by_grid) > 1:
            name = f"{NAME}, {grid}"
        points = [Point(x, row.value, title=f"{name}: {row.value_ci}") for x in (0, last)]
        curves.append(Curve(points, name=name, colour="grey", style="dashed"))
    return curves
