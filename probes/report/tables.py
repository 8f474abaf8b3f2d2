"""Build the tables of a study, next to the numbers of the paper."""

from typing import Any

from probes.models.sites import FINAL_NORM
from probes.results.formatting import Rows, bounds, run_columns
from probes.results.paper import PAPER
from probes.results.study import StudyRuns

from .verdicts import COLUMNS


def claim_rows(claims: list[dict[str, Any]]) -> Rows:
    """Return one row per claim: the main runs' number, the untrained control, and the three columns of verdicts."""
    rows = []
    for claim in claims:
        control = claim["control"] or {"value": None, "ci95": None}
        row = {
            "claim": claim["claim"],
            "image_attention": claim["image_attention"],
            "value": claim["value"],
            **bounds(claim["ci95"]),
            "holds": claim["holds"],
            "images": claim["n"]["images"],
            "patches": claim["n"].get("patches"),
            "untrained": control["value"],
            **bounds(control["ci95"], "untrained_"),
        }
        for name in COLUMNS:
            row |= _verdict_columns(name, claim["verdicts"][name])
        for key in ("supported", "conclusion", "finding", "truth", "p", "p_holm"):
            row[key] = claim.get(key)
        rows.append(row)
    return rows


def _verdict_columns(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a row about one column of verdicts."""
    row = {name: entry["value"]} | bounds(entry["ci95"], f"{name}_")
    if name == "paper":
        below = entry.get("below_optimum") or {"value": None, "ci95": None}
        row["below_optimum"] = below["value"]
        row |= bounds(below["ci95"], "below_optimum_")
    row[f"{name}_verdict"] = entry["verdict"]
    row[f"{name}_detectable"] = entry.get("detectable")
    row[f"{name}_reason"] = entry.get("reason")
    return row


SUMMARY = ("encoder", "adapter", "peak_llm", "delta_enc", "recovery")


def table2(studies: list[StudyRuns]) -> Rows:
    """Return Table 2 (encoder, adapter, peak layer, gains): rows of the runs, then of the paper; [] without runs."""
    if not studies:
        return []
    rows = []
    for study in studies:
        for mask, run in study.main_runs.items():
            row = {
                "model": study.title if len(studies) > 1 else "this run",
                "image_attention": mask,
                "probes": run.probe_kind,
            }
            for key in SUMMARY:
                row[key] = run.metrics["summary"][key]
            scores = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
            row[FINAL_NORM] = scores.get(FINAL_NORM)
            rows.append(row)
    for encoder in ("clip", "dinov2", "siglip"):
        for mask in ("causal", "bidirectional"):
            row = {
                "model": f"paper, {encoder}, ADE20K",
                "image_attention": mask,
                "probes": "trained",
                **_paper_row(encoder, mask),
                FINAL_NORM: None,
                "read_from": PAPER["read_from"]["table2_ade20k_miou"],
            }
            rows.append(row)
    return rows


def _paper_row(encoder: str, mask: str) -> dict[str, float]:
    numbers = PAPER["table2_ade20k_miou"][encoder]
    values = [numbers["encoder"], *numbers[mask]]
    return {key: value / 100 for key, value in zip(SUMMARY, values, strict=True)}


def class_rows(study: StudyRuns) -> Rows:
    """Return the IoU per class and site."""
    return [
        run_columns(run)
        | {
            "site": entry["site"],
            "class": name,
            "iou": iou,
        }
        for run in (*study.main_runs.values(), *study.untrained.values())
        for entry in run.metrics["sites"]
        for name, iou in zip(run.metrics["classes"], entry["iou_per_class"], strict=True)
    ]


def mask_comparison_rows(comparison: dict[str, Any]) -> Rows:
    """Return bidirectional minus causal per site, then for drop-off and recovery."""
    return [
        {"of": entry.get("site") or entry["effect"], "difference": entry["difference"]}
        | bounds(entry["ci95"])
        | {"p": entry["p"], "p_corrected": entry.get("p_corrected")}
        for entry in [*comparison["sites"], *comparison["effects"]]
    ]
