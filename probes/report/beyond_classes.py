"""Drop-off and recovery of other tasks than segmentation, from solved or trained runs. Exploratory: no claim is made.

All differences are signed so that positive means better: the drop is how much worse the adapter is than the encoder,
recovery how much better the best layer is than the adapter. The best layer is chosen on other images than those it is
scored on (`effects.py`).

Shapes: B resamplings, S sites, N images, M sums per image, R strengths.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from llava_bidir.common.bootstrap import Estimate
from llava_bidir.common.errors import UserError
from probes.evaluation.bootstrap import resampled_task_scores, task_scores
from probes.results.task_run import TaskRun

from .effects import choose_layers, effects_of_sites, estimates_to_json, read_sites, sites_to_read, subtract
from .study import Rows

INSTRUMENTS = ("optimum", "closed_form")  # the first that a run has is shown


def read_task_runs(paths: Iterable[str]) -> list[TaskRun]:
    """Return the runs of `probes report --tasks`.

    Raises:
        UserError: A run is of segmentation, or two trained runs are of the same task, mask, data and seed.
    """
    runs, seen = [TaskRun(path) for path in paths], {}
    for run in runs:
        key = (*_pair_key(run), _is_control(run), run.metrics["seed"], run.metrics.get("draw", 0), run.metrics["mllm"])
        if key in seen:
            raise UserError(f"{seen[key].path} and {run.path} are of the same task and model; pass one of them")
        seen[key] = run
    return runs


def _pair_key(run: TaskRun) -> tuple[str, str, str]:
    """Return what a run and its control have in common."""
    return run.task_name, run.metrics["image_attention"], run.manifest["data"]["fingerprint"]


def _is_control(run: TaskRun) -> bool:
    return bool(run.metrics["untrained"]) or run.metrics.get("match", "none") != "none"


def effects(run: TaskRun, sums: Tensor) -> dict[str, Estimate]:
    """Return "adapter_drop" and "recovery" of a run in units of its main score, from sums f[S, N, M]."""
    task, name = run.task, run.task.score
    score = lambda sites, weights: task.sign * resampled_task_scores(task, sums[sites], weights)[name]
    best = choose_layers(run.sites, score, sums.shape[1], run.groups)
    site_of_image = sites_to_read(run.sites, best, sums.shape[1])
    if not site_of_image:
        return {}
    read = read_sites(sums, site_of_image)
    values = (task.sign * task_scores(task, read)[name]).tolist()
    resampled = task.sign * resampled_task_scores(task, read, run.weights)[name]
    return effects_of_sites({site: (values[i], resampled[:, i]) for i, site in enumerate(site_of_image)})


def task_results(runs: list[TaskRun]) -> list[dict[str, Any]]:
    """Return the entry "tasks" of results.json, one entry per trained run.

    Each has the scores by site, "adapter_drop" and "recovery" with intervals, "recovery_beyond_control" if there is a
    run of the same task and mask with random weights, and "path": the effects at every strength of regularisation.
    """
    controls: dict[tuple, TaskRun] = {}
    for run in runs:
        if _is_control(run):
            controls.setdefault(_pair_key(run), run)
    return [_entry(run, controls.get(_pair_key(run))) for run in runs if not _is_control(run)]


def _entry(run: TaskRun, control: TaskRun | None) -> dict[str, Any]:
    own, score = effects(run, run.sums), run.task.score
    if control and "recovery" in own:
        other = effects(control, control.sums).get("recovery")
        own |= {"recovery_beyond_control": subtract(own["recovery"], other)} if other else {}
    return {
        "task": run.task_name,
        "score": score,
        "better": run.metrics["scores"][score],
        "image_attention": run.metrics["image_attention"],
        "seed": run.metrics["seed"],
        "solved": run.metrics["probe"].get("solved"),
        "sites": _sites(run),
        "control": _sites(control) if control else None,
        **estimates_to_json(own),
        "path": _path(run),
    }


def _sites(run: TaskRun) -> list[dict[str, Any]]:
    score = run.task.score
    return [
        {"site": site["site"], "value": site[score], "ci95": site[f"{score}_ci95"]} for site in run.metrics["sites"]
    ]


def _path(run: TaskRun) -> list[dict[str, Any]]:
    solved = run.metrics.get("path") or {}
    for instrument in INSTRUMENTS:
        if solved.get(instrument):
            by_strength = zip(solved[instrument]["strengths"], run.path_sums(instrument), strict=True)
            return [{"strength": r, **estimates_to_json(effects(run, sums))} for r, sums in by_strength]
    return []


def task_table(results: list[dict[str, Any]], label: dict[str, dict[str, str]]) -> Rows:
    """Return a row of text per entry of :func:`task_results`.

    Args:
        results: The entries.
        label: Names of scores in reports, by task and score.
    """
    rows = []
    for entry in results:
        site = {row["site"]: row["value"] for row in entry["sites"]}
        number = lambda name, entry=entry: _format(entry[name]) if name in entry else "-"
        held = sum(row["recovery"]["ci95"][0] > 0 for row in entry["path"] if "recovery" in row)
        rows.append(
            {
                "task": entry["task"],
                "score": f"{label[entry['task']][entry['score']]}, {entry['better']} is better",
                "mask": entry["image_attention"],
                "seed": str(entry["seed"]),
                "encoder": f"{site['encoder']:.3g}" if "encoder" in site else "-",
                "adapter": f"{site['adapter']:.3g}" if "adapter" in site else "-",
                "drop": number("adapter_drop"),
                "recovery": number("recovery"),
                "beyond_control": number("recovery_beyond_control"),
                "strengths_with_recovery": f"{held} of {len(entry['path'])}" if entry["path"] else "-",
            }
        )
    return rows


def _format(estimate: dict[str, Any]) -> str:
    low, high = estimate["ci95"]
    return f"{estimate['value']:+.3g} [{low:+.3g}, {high:+.3g}]"
