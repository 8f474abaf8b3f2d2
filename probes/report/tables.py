"""Build the tables of a study, next to the numbers of the paper, and format tables as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from typing import Any

from probes.models.sites import FINAL_NORM
from probes.results.probe_run import ProbeRun

from .paper import PAPER, paper_encoder, probe_deviations
from .study import Rows, Study
from .verdicts import COLUMNS


def format_csv(rows: Rows) -> str:
    """Return CSV text whose columns are the union of all keys in order of appearance; fractions stay 0..1."""
    keys, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def bounds(ci95: Sequence[float | None], prefix: str = "") -> dict[str, Any]:
    """Return the columns of an interval: low and high."""
    return {f"{prefix}low": ci95[0], f"{prefix}high": ci95[1]}


def run_columns(run: ProbeRun) -> dict[str, Any]:
    """Return the columns that tell the runs of a study apart."""
    match = run.metrics.get("match", "none")
    random = {} if match == "none" else {"match": match, "draw": run.metrics["draw"]}
    kind = {"untrained": bool(run.metrics["untrained"]), "probes": run.probe_kind}
    return {"image_attention": run.metrics["image_attention"]} | kind | random


def study_tables(study: Study, results: dict[str, Any]) -> dict[str, Rows]:
    """Return the tables of one study by file name, from its runs and its part of results.json; none is empty."""
    by_name = {
        "claims": claim_rows(results["claims"]),
        "classes": class_rows(study),
        "table3": table3(results["starvation"]) if results["starvation"] else [],
        **knockout_tables(results["knockout_inference"]),
        "paired": mask_comparison_rows(results["paired"]) if results["paired"] else [],
    }
    return {name: rows for name, rows in by_name.items() if rows}


def claim_rows(claims: list[dict[str, Any]]) -> Rows:
    """Return one row per claim: the main runs' number, the untrained control, and the three columns of verdicts."""
    controls = [claim["control"] or {"value": None, "ci95": [None, None]} for claim in claims]
    return [
        {key: claim[key] for key in ("claim", "image_attention", "value")}
        | bounds(claim["ci95"])
        | {"holds": claim["holds"], "images": claim["n"]["images"], "patches": claim["n"].get("patches")}
        | {"untrained": control["value"]}
        | bounds(control["ci95"], "untrained_")
        | {key: value for name in COLUMNS for key, value in _verdict_columns(name, claim["verdicts"][name]).items()}
        | {key: claim.get(key) for key in ("supported", "conclusion", "truth", "p", "p_holm")}
        for claim, control in zip(claims, controls, strict=True)
    ]


def _verdict_columns(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: entry["value"]} | bounds(entry["ci95"] or [None, None], f"{name}_")
    below = entry.get("below_optimum") or {"value": None, "ci95": [None, None]}
    numbers |= {"below_optimum": below["value"]} | bounds(below["ci95"], "below_optimum_") if name == "paper" else {}
    numbers |= {f"{name}_verdict": entry["verdict"], f"{name}_detectable": entry.get("detectable")}
    return numbers | {f"{name}_reason": entry.get("reason")}


SUMMARY = ("encoder", "adapter", "peak_llm", "delta_enc", "recovery")


def table2(studies: list[Study]) -> Rows:
    """Return Table 2 (encoder, adapter, peak layer, gains): rows of the runs, then of the paper."""
    rows = [
        {"model": study.title if len(studies) > 1 else "this run", "image_attention": mask}
        | {"probes": run.probe_kind}
        | {key: run.metrics["summary"][key] for key in SUMMARY}
        | {FINAL_NORM: next((entry["miou"] for entry in run.metrics["sites"] if entry["site"] == FINAL_NORM), None)}
        for study in studies
        for mask, run in study.trained.items()
    ]
    return rows + [
        {"model": f"paper, {encoder}, ADE20K", "image_attention": mask, "probes": "trained"}
        | _paper_row(encoder, mask)
        | {FINAL_NORM: None}
        | {"read_from": PAPER["read_from"]["table2_ade20k_miou"]}
        for encoder in ("clip", "dinov2", "siglip")
        for mask in ("causal", "bidirectional")
    ]


def _paper_row(encoder: str, mask: str) -> dict[str, float]:
    numbers = PAPER["table2_ade20k_miou"][encoder]
    return {k: number / 100 for k, number in zip(SUMMARY, [numbers["encoder"], *numbers[mask]], strict=True)}


def table2_difference(studies: list[Study]) -> Rows:
    """Return run minus paper for the runs that repeat a configuration of the paper; skip all others."""
    recipe = lambda run: ", ".join(f"{key} {value}" for key, value in probe_deviations(run).items())
    return [
        {"model": study.title, "image_attention": mask}
        | {key: run.metrics["summary"][key] - value for key, value in _paper_row(encoder, mask).items()}
        | {"probe_recipe": recipe(run) or "the paper's"}
        for study in studies
        for mask, run in study.trained.items()
        if (encoder := paper_encoder(run))
    ]


def table3(starvation: dict[str, Any]) -> Rows:
    """Return Table 3 (accuracy at the first three patches): rows of the runs, then of the paper."""
    keys, paper = ("causal", "bidirectional", "gap"), PAPER["table3_patch_accuracy"]
    number = lambda x: None if math.isnan(x) else x  # a patch without a labelled pixel
    rows = [{"model": "this run", "patch": i} | {key: number(starvation[key][i]) for key in keys} for i in range(3)]
    return rows + [
        {"model": "paper, clip, ADE20K", "patch": i} | dict(zip(keys, paper[f"patch_{i}"], strict=False))
        for i in range(3)
    ]


def class_rows(study: Study) -> Rows:
    """Return the IoU per class and site."""
    return [
        run_columns(run) | {"site": entry["site"], "class": name, "iou": iou}
        for run in study.runs
        for entry in run.metrics["sites"]
        for name, iou in zip(run.metrics["classes"], entry["iou_per_class"], strict=True)
    ]


def knockout_tables(inference: dict[str, dict[str, Any]]) -> dict[str, Rows]:
    """Return the tables of `knockout_inference` by mask: classes, means and criterion shifts."""
    return {
        "knockout_classes": _knockout_class_rows(inference),
        "knockout_means": knockout_mean_rows(inference),
        "knockout_shifts": shift_rows(inference),
    }


def _knockout_class_rows(inference: dict[str, dict[str, Any]]) -> Rows:
    """Return the tests of the classes by outcome, with the interval in two columns."""
    return [
        {"image_attention": mask, "outcome": outcome}
        | {name: value for name, value in row.items() if name != "ci95"}
        | bounds(row["ci95"])
        for mask, of_mask in inference.items()
        for outcome, of_outcome in of_mask["outcomes"].items()
        for row in of_outcome["classes"]
    ]


def knockout_mean_rows(inference: dict[str, dict[str, Any]]) -> Rows:
    """Return each effect as a mean over classes and over pairs of look-alikes."""
    return [
        {"image_attention": mask, "outcome": outcome, "effect": effect, "mean_over": over, "value": mean["value"]}
        | bounds(mean["ci95"] or [None, None])
        | {key: mean[key] for key in ("classes", "units", "sd", "verdict")}
        for mask, of_mask in inference.items()
        for outcome, of_outcome in of_mask["outcomes"].items()
        for over, means in (("classes", of_outcome["mean"]), ("pairs", of_outcome["mean_over_pairs"]))
        for effect, mean in means.items()
    ]


def shift_rows(inference: dict[str, dict[str, Any]]) -> Rows:
    """Return the move of the read-out towards the first class of a pair, by class hidden."""
    return [
        {"image_attention": mask, "first": entry["classes"][0], "second": entry["classes"][1], "hidden": name}
        | {"move_to_first": move["value"], **bounds(move["ci95"])}
        | {"images": entry["images"], "shift": entry["shift"], "towards": entry["towards"]}
        for mask, of_mask in inference.items()
        for entry in of_mask["criterion_shifts"] or ()
        for name, move in entry["hide"].items()
    ]


def mask_comparison_rows(comparison: dict[str, Any]) -> Rows:
    """Return bidirectional minus causal per site, then for drop-off and recovery."""
    return [
        {"of": entry.get("site") or entry["effect"], "difference": entry["difference"]}
        | bounds(entry["ci95"])
        | {"p": entry["p"], "p_corrected": entry.get("p_corrected")}
        for entry in [*comparison["sites"], *comparison["effects"]]
    ]
