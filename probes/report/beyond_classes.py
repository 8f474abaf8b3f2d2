"""Drop-off and recovery of other tasks than segmentation, from solved or trained runs. Exploratory: no claim is made.

All differences are signed so that positive means better: the drop is how much worse the adapter is than the encoder,
recovery how much better the best layer is than the adapter. The best layer is chosen on other images than those it is
scored on (`effects.py`).

With several seeds, each has its own control, and effects are joined as claims are (`seeds.py`).

Shapes: B resamplings, S sites, N images, M sums per image.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import Estimate
from llava_bidir.common.errors import UserError
from probes.evaluation.bootstrap import resampled_task_scores, task_scores
from probes.models.sites import ENCODER
from probes.results.formatting import Rows
from probes.results.study import model_name, read_run, study_keys
from probes.results.task_run import TaskRun

from .effects import choose_layers, effects_of_sites, estimate_to_json, read_sites, sites_to_read, subtract
from .path import has_converged, neighbours
from .seeds import join_entries, share_images

log = logging.getLogger(__name__)


def read_task_runs(paths: Iterable[str]) -> list[TaskRun]:
    """Return the runs of `probes report --tasks`: folders, or NAME=FOLDER, which names the model.

    Raises:
        UserError: A run is of segmentation, or two runs are of the same task, model, mask, data and seed.
    """
    runs, seen = [read_run(path, TaskRun) for path in paths], {}
    for run in runs:
        facts = [run.metrics[name] for name in ("dataset", "image_attention", "seed")]
        key = (run.task_name, model_name(run), *facts, is_control(run))
        if key in seen:
            raise UserError(f"{seen[key].path} and {run.path} are of the same task, model, data and seed; pass one")
        seen[key] = run
    return runs


def is_control(run: TaskRun) -> bool:
    """Return whether a run has random weights."""
    return bool(run.metrics["untrained"]) or run.metrics.get("match", "none") != "none"


def describe_control(run: TaskRun) -> str:
    """Return what is random in a control: "random LLM that changes the states as much", "untrained adapter and LLM"."""
    parts = " and ".join(part.replace("llm", "LLM") for part in run.metrics["untrained"])
    kinds = {"update": "random {} that changes the states as much", "permuted": "permuted {}", "none": "untrained {}"}
    return kinds[run.metrics.get("match", "none")].format(parts)


def sites_of_task(run: TaskRun, sums: Tensor) -> dict[str, Tensor]:
    """Return for encoder, adapter and best layer, where probed, the index of the site to read per image, i64[N]."""
    task, name = run.task, run.task.score
    score = lambda sites, weights: task.sign * resampled_task_scores(task, sums[sites], weights)[name]
    return sites_to_read(run.sites, choose_layers(run.sites, score, sums.shape[1], run.groups), sums.shape[1])


def effects(run: TaskRun, sums: Tensor) -> dict[str, Estimate]:
    """Return "adapter_drop" and "recovery" of a run in units of its main score, from sums f[S, N, M]."""
    task, name, site_of_image = run.task, run.task.score, sites_of_task(run, sums)
    if not site_of_image:
        return {}
    read = read_sites(sums, site_of_image)
    values = (task.sign * task_scores(task, read)[name]).tolist()
    resampled = task.sign * resampled_task_scores(task, read, run.weights)[name]
    return effects_of_sites({site: (values[i], resampled[:, i]) for i, site in enumerate(site_of_image)})


def task_results(runs: list[TaskRun]) -> list[dict[str, Any]]:
    """Return the entry "tasks" of results.json, one entry per trained run.

    Each has the scores by site, "adapter_drop" and "recovery" with intervals, "recovery_beyond_control" if there is a
    run of the same task and mask with random weights ("control_is" says of which), and "path": the effects at the
    chosen strength of regularisation and its neighbours, and whether the probes that the recovery reads have
    "converged".

    Raises:
        UserError: A run has two controls, or one that was not probed in the same way.
    """
    key_of = study_keys([run for run in runs if not is_control(run)])
    pair_key = lambda run: (
        *key_of(run),
        *(run.task_name, run.metrics["image_attention"], run.manifest["data"]["fingerprint"]),
    )
    controls: dict[tuple, TaskRun] = {}
    for run in filter(is_control, runs):
        if (other := controls.setdefault(pair_key(run), run)) is not run:
            raise UserError(f"{other.path} and {run.path} are two controls of the same runs; pass one")
    trained = {pair_key(run): run for run in runs if not is_control(run)}
    for control in (control for key, control in controls.items() if key not in trained):
        log.warning("%s is left out: no run of the trained model has its task, mask, seed and images", control.path)
    return [_entry(run, controls.get(key)) for key, run in trained.items()]


def _entry(run: TaskRun, control: TaskRun | None) -> dict[str, Any]:
    own, score = effects(run, run.sums), run.task.score
    if control:
        run.check_same_images(control)
        run.check_same_probes(control)
    if control and "recovery" in own:
        other = effects(control, control.sums).get("recovery")
        own |= {"recovery_beyond_control": subtract(own["recovery"], other)} if other else {}
    return {
        "task": run.task_name,
        "model": model_name(run),
        "dataset": run.metrics["dataset"],
        "score": score,
        "better": run.metrics["scores"][score],
        "image_attention": run.metrics["image_attention"],
        "seed": run.metrics["seed"],
        "data_fingerprint": run.manifest["data"]["fingerprint"],
        "solved": run.metrics["probe"].get("solved"),
        "sites": _sites(run),
        "control": _sites(control) if control else None,
        "control_is": describe_control(control) if control else None,
        **{name: estimate_to_json(effect) for name, effect in own.items()},
        "path": _path(run),
    }


def _sites(run: TaskRun) -> list[dict[str, Any]]:
    score = run.task.score
    return [
        {"site": site["site"], "value": site[score], "ci95": site[f"{score}_ci95"]} for site in run.metrics["sites"]
    ]


def _path(run: TaskRun) -> list[dict[str, Any]]:
    if not run.is_solved:
        return []
    path, entries = run.path_sums(), []
    for name, row in neighbours(run).items():
        sums = path[row, torch.arange(len(row))]
        read = [site for site_name, site in sites_of_task(run, sums).items() if site_name != ENCODER]
        converged = has_converged(run, row, torch.cat(read).unique().tolist() if read else [])
        found = {effect: estimate_to_json(estimate) for effect, estimate in effects(run, sums).items()}
        entries.append({"row": name, **found, "converged": converged})
    return entries


def group_by_seed(results: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return entries with "seed" that differ in nothing else but their data, in the order of the first of each."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for entry in results:
        key = tuple(entry.get(name) for name in ("model", "dataset", "task", "image_attention", "solved"))
        groups.setdefault(key, []).append(entry)
    return list(groups.values())


def joint_task_results(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entry "joint_tasks" of results.json: the entries of :func:`task_results` with several seeds, joined.

    They have "seeds" in place of "seed", and estimates have "by_seed", the values of the seeds. Sites, effects and rows
    of strengths that a seed lacks are left out, and controls of different kinds.
    """
    return [_join([entry["seed"] for entry in group], group) for group in group_by_seed(results) if len(group) > 1]


def _join(seeds: list[int], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the entry of all seeds."""
    shared = share_images([entry["data_fingerprint"] for entry in entries])
    joint = {"seeds": seeds} | join_entries(seeds, entries, shared)
    if len({entry["control_is"] for entry in entries}) > 1:
        joint |= {"control": None, "control_is": None}
        joint.pop("recovery_beyond_control", None)
    return {key: value for key, value in joint.items() if key not in ("seed", "data_fingerprint")}


def task_table(results: list[dict[str, Any]], label: dict[str, dict[str, str]]) -> Rows:
    """Return a row of text per entry of :func:`task_results` or :func:`joint_task_results`.

    Args:
        results: The entries.
        label: Names of scores in reports, by task and score.
    """
    rows = []
    for entry in results:
        site = {row["site"]: row["value"] for row in entry["sites"]}
        number = lambda name, entry=entry: _format(entry[name]) if name in entry else "-"
        held = sum(row["recovery"]["ci95"][0] > 0 for row in entry["path"] if "recovery" in row and row["converged"])
        rows.append(
            {
                **{key: entry[key] for key in ("task", "model", "dataset")},
                "score": f"{label[entry['task']][entry['score']]}, {entry['better']} is better",
                "mask": entry["image_attention"],
                "seed": ", ".join(map(str, entry.get("seeds") or [entry["seed"]])),
                "encoder": f"{site['encoder']:.3g}" if "encoder" in site else "-",
                "adapter": f"{site['adapter']:.3g}" if "adapter" in site else "-",
                "drop": number("adapter_drop"),
                "recovery": number("recovery"),
                "beyond_control": number("recovery_beyond_control"),
                "control": entry["control_is"] or "-",
                "strengths_with_recovery": f"{held} of {len(entry['path'])}" if entry["path"] else "-",
            }
        )
    return rows


def _format(estimate: dict[str, Any]) -> str:
    low, high = estimate["ci95"]
    return f"{estimate['value']:+.3g} [{low:+.3g}, {high:+.3g}]"
