"""Drop-off and recovery of other tasks than segmentation, from solved or trained runs. Exploratory: no claim is made.

All differences are signed so that positive means better: the drop is how much worse the adapter is than the encoder,
recovery how much better the best layer is than the adapter. Of a bare encoder, the best layer is compared with the
patch embeddings and with the last layer. The best layer is chosen on other images than those it is scored on
(`probes/evaluation/layer_effects.py`).
"""

import logging
from collections.abc import Iterable
from typing import Any

from llava_bidir.common.errors import UserError
from probes.evaluation.estimate import estimate_text
from probes.evaluation.layer_effects import EFFECTS
from probes.models.sites import ENCODER, PATCHES, is_layer
from probes.results.comparable import (
    check_same_images,
    check_same_layers,
    check_same_probes,
    check_same_settings,
)
from probes.results.finished_run import FinishedRun
from probes.results.formatting import Rows
from probes.results.study import check_differ, model_name, read_run, study_keys
from probes.tasks import SEGMENTATION

log = logging.getLogger(__name__)

# effects from which that of random weights is subtracted
BEYOND_CONTROL = ("recovery", "layer_gain")


def read_task_runs(paths: Iterable[str]) -> list[FinishedRun]:
    """Return the runs of `probes report --tasks`: folders, or NAME=FOLDER, which names the model.

    Raises:
        UserError: A run is of segmentation, or two runs are of the same task, model, mask, data and seed, or of all
            these but the mask with other probes.
    """
    runs = [read_run(path, FinishedRun) for path in paths]
    for run in runs:
        if run.task_name == SEGMENTATION:
            raise UserError(
                f"{run.path} is a run of {SEGMENTATION}; expected one of another task (--tasks)"
            )
    seen = {}
    for run in runs:
        compared = (run.task_name, model_name(run), run.metrics["dataset"], run.metrics["seed"])
        check_same_probes(seen.setdefault(compared, run), run)
        key = (*compared, run.metrics["image_attention"], run.arm == "trained")
        if seen.setdefault(key, run) is not run:
            raise UserError(
                f"{seen[key].path} and {run.path} are of the same task, model, data and seed; pass one"
            )
    return runs


def task_results(runs: list[FinishedRun]) -> list[dict[str, Any]]:
    """Return the entry "tasks" of results.json, one entry per trained run.

    Each has the scores by site, "adapter_drop" and "recovery" with intervals ("layer_gain" and "over_last" of a bare
    encoder), and "recovery_beyond_control" ("layer_gain_beyond_control") if there is a run of the same task and mask
    with random weights; "control_is" says which. "unit" is the site whose score is 1 in the figure, or None.

    Raises:
        UserError: A run has two controls, or one on images that were read in another way.
    """
    key_of = study_keys([run for run in runs if run.arm == "trained"])

    def pair_key(run):
        return (
            *key_of(run),
            *(run.task_name, run.metrics["image_attention"], run.manifest["data"]["fingerprint"]),
        )

    controls: dict[tuple, FinishedRun] = {}
    for run in (run for run in runs if run.arm != "trained"):
        if (other := controls.setdefault(pair_key(run), run)) is not run:
            raise UserError(
                f"{other.path} and {run.path} are two controls of the same runs; pass one"
            )
    trained = {pair_key(run): run for run in runs if run.arm == "trained"}
    for control in (control for key, control in controls.items() if key not in trained):
        log.warning(
            "%s is left out: no run of the trained model has its task, mask, seed and images",
            control.path,
        )
    return [_entry(run, controls.get(key)) for key, run in trained.items()]


def _entry(run: FinishedRun, control: FinishedRun | None) -> dict[str, Any]:
    own = {name: run.effects[name] for name in EFFECTS if name in run.effects}
    score = run.task.score
    if control:
        check_same_images(run, control)
        check_same_settings(run, control)
        if control.arm != "adapter":
            check_same_layers(run, control)
            check_differ(run, control, control.sites[1:], "random weights have changed nothing")
        for name in BEYOND_CONTROL:
            if name in own and name in control.effects:
                own[f"{name}_beyond_control"] = own[name] - control.effects[name]
    return {
        "task": run.task_name,
        "model": model_name(run),
        "dataset": run.metrics["dataset"],
        "score": score,
        "better": run.metrics["scores"][score],
        "image_attention": run.metrics["image_attention"],
        "seed": run.metrics["seed"],
        "has_llm": run.has_llm,
        "unit": _unit_site(run),
        "sites": _sites(run),
        "control": _sites(control) if control else None,
        "control_is": control.arm if control else None,
        **{name: effect.json() for name, effect in own.items()},
    }


def _unit_site(run: FinishedRun) -> str | None:
    """Return the encoder of an MLLM, or the last layer of a bare encoder, if probed."""
    if run.has_llm:
        return ENCODER if ENCODER in run.sites else None
    return last_layer(run.sites)


def last_layer(sites: list[str]) -> str | None:
    """Return the last layer among sites in forward order; None if there is none."""
    return next((site for site in reversed(sites) if is_layer(site)), None)


def _sites(run: FinishedRun) -> list[dict[str, Any]]:
    score = run.task.score
    return [
        {
            "site": site["site"],
            "value": site[score],
            "ci95": site[f"{score}_ci95"],
        }
        for site in run.metrics["sites"]
    ]


def task_table(results: list[dict[str, Any]], label: dict[str, dict[str, str]]) -> Rows:
    """Return a row of text per entry of :func:`task_results` that is of an MLLM.

    Args:
        results: The entries.
        label: Names of scores in reports, by task and score.
    """
    rows = []
    for entry in results:
        if not entry["has_llm"]:
            continue
        scores = _score_texts(entry)
        rows.append(
            {key: entry[key] for key in ("task", "model", "dataset")}
            | {"score": _score_name(entry, label)}
            | {"mask": entry["image_attention"], "seed": str(entry["seed"])}
            | {name: scores.get(name, "-") for name in ("encoder", "adapter")}
            | {"drop": _effect_text(entry, "adapter_drop")}
            | {"recovery": _effect_text(entry, "recovery")}
            | {"beyond_control": _effect_text(entry, "recovery_beyond_control")}
            | {"control": entry["control_is"] or "-"}
        )
    return rows


def encoder_task_table(results: list[dict[str, Any]], label: dict[str, dict[str, str]]) -> Rows:
    """Return a row of text per entry of :func:`task_results` that is of a bare encoder.

    Args:
        results: The entries.
        label: Names of scores in reports, by task and score.
    """
    rows = []
    for entry in results:
        if entry["has_llm"]:
            continue
        scores = _score_texts(entry)
        rows.append(
            {key: entry[key] for key in ("task", "model", "dataset")}
            | {"score": _score_name(entry, label), "seed": str(entry["seed"])}
            | {"patch_embeddings": scores.get(PATCHES, "-")}
            | {"last_layer": scores.get(entry["unit"], "-")}
            | {"best_over_patches": _effect_text(entry, "layer_gain")}
            | {"best_over_last": _effect_text(entry, "over_last")}
            | {"beyond_control": _effect_text(entry, "layer_gain_beyond_control")}
            | {"control": entry["control_is"] or "-"}
        )
    return rows


def _score_texts(entry: dict[str, Any]) -> dict[str, str]:
    """Return the score of an entry at each site as text."""
    return {row["site"]: f"{row['value']:.3g}" for row in entry["sites"]}


def _score_name(entry: dict[str, Any], label: dict[str, dict[str, str]]) -> str:
    """Return the name of an entry's score, and which way it is better."""
    return f"{label[entry['task']][entry['score']]}, {entry['better']} is better"


def _effect_text(entry: dict[str, Any], name: str) -> str:
    """Return an effect of an entry with its interval, or "-"."""
    return estimate_text(entry[name]) if name in entry else "-"
