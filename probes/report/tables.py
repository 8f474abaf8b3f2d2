"""Build the tables of a study, next to the numbers of the paper, and format tables as CSV."""

import csv
import io
from typing import Any

from llava_bidir.common.bootstrap import interval
from probes.analyses.knockout.effects import read_cases

from .claims import knockout_effects, min_confused_patches
from .paper import PAPER, paper_encoder, probe_deviations
from .study import Rows, Study


def format_csv(rows: Rows) -> str:
    """Return CSV text whose columns are the union of all keys in order of appearance; fractions stay 0..1."""
    keys, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def claim_rows(claims: list[dict[str, Any]]) -> Rows:
    """Return one row per claim with its interval and the untrained control."""
    rows = []
    for claim in claims:
        control = claim["control"] or {"value": None, "ci95": [None, None]}
        low_high = dict(zip(("low", "high"), claim["ci95"], strict=True))
        control_low_high = dict(zip(("untrained_low", "untrained_high"), control["ci95"], strict=True))
        rows.append(
            {key: claim[key] for key in ("claim", "image_attention", "value")}
            | low_high
            | {"holds": claim["holds"], "untrained": control["value"]}
            | control_low_high
        )
    return rows


SUMMARY = ("encoder", "adapter", "peak_llm", "delta_enc", "recovery")


def table2(studies: list[Study]) -> Rows:
    """Return Table 2 (encoder, adapter, peak layer, gains): rows of the runs, then of the paper."""
    rows = [
        {"model": study.title if len(studies) > 1 else "this run", "image_attention": mask}
        | {key: run.metrics["summary"][key] for key in SUMMARY}
        for study in studies
        for mask, run in study.trained.items()
    ]
    return rows + [
        {"model": f"paper, {encoder}, ADE20K", "image_attention": mask}
        | _paper_row(encoder, mask)
        | {"read_from": PAPER["read_from"]["table2_ade20k_miou"]}
        for encoder in ("clip", "dinov2", "siglip")
        for mask in ("causal", "bidirectional")
    ]


def _paper_row(encoder: str, mask: str) -> dict[str, float]:
    numbers = PAPER["table2_ade20k_miou"][encoder]
    return {k: number / 100 for k, number in zip(SUMMARY, [numbers["encoder"], *numbers[mask]], strict=True)}


def table2_difference(studies: list[Study]) -> Rows:
    """Return run minus paper for the runs that repeat a configuration of the paper; skip all others."""
    rows = []
    for study in studies:
        for mask, run in study.trained.items():
            encoder = paper_encoder(run)
            if encoder is None:
                continue
            summary, paper = run.metrics["summary"], _paper_row(encoder, mask)
            deviations = ", ".join(f"{key} {value}" for key, value in probe_deviations(run).items())
            rows.append(
                {"model": study.title, "image_attention": mask}
                | {key: summary[key] - paper[key] for key in SUMMARY}
                | {"probe_recipe": deviations or "the paper's"}
            )
    return rows


def table3(starvation: dict[str, Any]) -> Rows:
    """Return Table 3 (accuracy at the first three patches): rows of the runs, then of the paper."""
    rows = [
        {"model": "this run", "patch": i} | {key: starvation[key][i] for key in ("causal", "bidirectional", "gap")}
        for i in range(3)
    ]
    for i in range(3):
        causal, bidirectional, gap, _ = PAPER["table3_patch_accuracy"][f"patch_{i}"]
        rows.append(
            {"model": "paper, clip, ADE20K", "patch": i, "causal": causal, "bidirectional": bidirectional, "gap": gap}
        )
    return rows


def class_rows(study: Study) -> Rows:
    """Return the IoU per class and site."""
    return [
        {"image_attention": run.metrics["image_attention"], "untrained": bool(run.metrics["untrained"]),
         "site": entry["site"], "class": name, "iou": iou}
        for run in study.runs
        for entry in run.metrics["sites"]
        for name, iou in zip(run.metrics["classes"], entry["iou_per_class"], strict=True)
    ]  # fmt: skip


def selection_rows(study: Study) -> Rows:
    """Return the knockout effects by the minimum number of wrong patches that an image needs to count."""
    rows = []
    for mask, run in study.trained.items():
        claimed_at = min_confused_patches(run)
        for patches in sorted({max(1, round(claimed_at * share)) for share in (0, 1 / 8, 1 / 4, 1 / 2, 1, 3 / 2)}):
            cases, effects = read_cases(run, patches), knockout_effects(run, patches)
            for name, (value, resampled) in effects.items():
                low, high = interval(value, resampled)
                row = {"image_attention": mask, "min_patches": patches, "cases": len(cases.images), "effect": name}
                rows.append(row | {"value": value, "low": low, "high": high})
    return rows


def mask_comparison_rows(comparison: dict[str, Any]) -> Rows:
    """Return bidirectional minus causal per site, then for drop-off and recovery."""
    rows = []
    for entry in [*comparison["sites"], *comparison["effects"]]:
        low, high = entry["ci95"]
        row = {"of": entry.get("site") or entry["effect"], "difference": entry["difference"], "low": low, "high": high}
        rows.append(row | {"p": entry["p"], "p_corrected": entry.get("p_corrected")})
    return rows


def seed_rows(seeds: dict[str, list[dict[str, Any]]]) -> Rows:
    """Return the spread over probe seeds next to the interval over images, per mask, site and effect."""
    return [
        {"image_attention": mask} | {key: entry[key] for key in entry if key != "ci95"}
        | dict(zip(("low", "high"), entry["ci95"], strict=True))
        for mask, entries in seeds.items()
        for entry in entries
    ]  # fmt: skip
