"""Starvation of other tasks than segmentation: mean error by position under both masks. Exploratory."""

import logging
import math
from typing import Any

from probes.analyses.starvation.run import shared_layer, starvation
from probes.results.formatting import Rows
from probes.results.study import MASKS, model_name, study_keys
from probes.results.task_run import TaskRun

from .beyond_classes import group_by_seed, is_control
from .seeds import mean_over_seeds, share_images

log = logging.getLogger(__name__)


def task_starvation(runs: list[TaskRun]) -> list[dict[str, Any]]:
    """Return the entry "tasks_starvation" of results.json, one per pair of trained runs under both masks.

    Each is the content of starvation.json with "model", "solved", "dataset", "seed" and "data_fingerprint". Tasks whose
    pixels have no error of their own have none.

    Raises:
        UserError: The runs of a pair were not probed in the same way.
    """
    trained = [run for run in runs if not is_control(run) and run.task.pixel_error]
    key_of, pairs = study_keys(trained), {}
    for run in trained:
        if not run.has_patch_errors:
            log.warning("%s was made before errors by position were kept; its starvation is left out", run.path)
            continue
        key = (run.task_name, *key_of(run), run.manifest["data"]["fingerprint"])
        pairs.setdefault(key, {})[run.metrics["image_attention"]] = run
    results = []
    for by_mask in pairs.values():
        if by_mask.keys() >= set(MASKS):
            first, second = (by_mask[mask] for mask in MASKS)
            if shared_layer(first, second) is None:
                text = "starvation of %s and %s is left out, since they do not share the causal run's best layer"
                log.warning(text, first.path, second.path)
                continue
            about = {"model": model_name(first), "solved": first.metrics["probe"].get("solved")}
            about |= {key: first.metrics[key] for key in ("dataset", "seed")}
            about |= {"data_fingerprint": first.manifest["data"]["fingerprint"]}
            results.append(starvation(first, second) | about)
    return results


def joint_task_starvation(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entry "joint_tasks_starvation" of results.json: the entries with several seeds, joined by patch."""
    groups = [group for group in group_by_seed(results) if len(group) > 1]
    return [_join([entry["seed"] for entry in group], group) for group in groups]


def _join(seeds: list[int], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the gaps of all seeds, as means with intervals over seeds."""
    by_patch = zip(*(list(zip(entry["gap"], entry["gap_ci95"], strict=True)) for entry in entries), strict=True)
    shared = share_images([entry["data_fingerprint"] for entry in entries])
    gaps = [mean_over_seeds(list(estimates), shared) for estimates in by_patch]
    row = mean_over_seeds([(entry["first_row"]["gap"], entry["first_row"]["gap_ci95"]) for entry in entries], shared)
    return {
        **{key: entries[0][key] for key in ("task", "error", "model", "dataset", "grid")},
        "seeds": seeds,
        "gap": [value for value, _ in gaps],
        "gap_ci95": [ci95 for _, ci95 in gaps],
        "first_row": {"gap": row[0], "gap_ci95": row[1]},
    }


def starvation_table(results: list[dict[str, Any]]) -> Rows:
    """Return a row of text per entry of :func:`task_starvation` or :func:`joint_task_starvation`."""
    return [
        {
            **{key: entry[key] for key in ("task", "model", "dataset")},
            "error": entry["error"],
            "seed": ", ".join(map(str, entry.get("seeds") or [entry["seed"]])),
            "site": entry.get("site", "of each seed"),
            "patch_0": _format_gap(entry["gap"][0], entry["gap_ci95"][0]),
            "first_row": _format_gap(entry["first_row"]["gap"], entry["first_row"]["gap_ci95"]),
        }
        for entry in results
    ]


def _format_gap(gap: float, ci95: list[float]) -> str:
    return "no labelled pixel" if math.isnan(gap) else f"{gap:+.3g} [{ci95[0]:+.3g}, {ci95[1]:+.3g}]"
