"""The paper's tables from a study, with the paper's own numbers beside them, and every number as CSV."""

import csv
import io
from typing import Any

from llava_bidir.common.bootstrap import interval
from probes.analyses.knockout.effects import read_cases

from .claims import confused_patches, knockout_effects
from .paper import PAPER, departures, paper_encoder
from .study import Rows, Study


def csv_text(rows: Rows) -> str:
    """Rows under the union of their keys, in the order in which keys come up; fractions stay 0..1."""
    keys, text = list(dict.fromkeys(key for row in rows for key in row)), io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def claim_rows(claims: list[dict[str, Any]]) -> Rows:
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
    """Table 2: adapter, peak LLM and what they make of the encoder; ours, then the paper's."""
    rows = [
        {"model": study.title if len(studies) > 1 else "this run", "image_attention": mask}
        | {key: run.metrics["summary"][key] for key in SUMMARY}
        for study in studies
        for mask, run in study.trained.items()
    ]
    return rows + [
        {"model": f"paper, {encoder}, ADE20K", "image_attention": mask}
        | _papers(encoder, mask)
        | {"read_from": PAPER["read_from"]["table2_ade20k_miou"]}
        for encoder in ("clip", "dinov2", "siglip")
        for mask in ("causal", "bidirectional")
    ]


def _papers(encoder: str, mask: str) -> dict[str, float]:
    theirs = PAPER["table2_ade20k_miou"][encoder]
    return {k: number / 100 for k, number in zip(SUMMARY, [theirs["encoder"], *theirs[mask]], strict=True)}


def table2_difference(studies: list[Study]) -> Rows:
    """Ours minus the paper's, of the runs that repeat a configuration of the paper; no other run is compared."""
    rows = []
    for study in studies:
        for mask, run in study.trained.items():
            encoder = paper_encoder(run)
            if encoder is None:
                continue
            ours, theirs = run.metrics["summary"], _papers(encoder, mask)
            other = ", ".join(f"{key} {value}" for key, value in departures(run).items())
            rows.append(
                {"model": study.title, "image_attention": mask}
                | {key: ours[key] - theirs[key] for key in SUMMARY}
                | {"probe_recipe": other or "the paper's"}
            )
    return rows


def table3(starvation: dict[str, Any]) -> Rows:
    """Table 3: accuracy under the first three patches; ours, then the paper's."""
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
    """IoU of every class at every site."""
    return [
        {"image_attention": run.metrics["image_attention"], "untrained": bool(run.metrics["untrained"]),
         "site": entry["site"], "class": name, "iou": iou}
        for run in study.runs
        for entry in run.metrics["sites"]
        for name, iou in zip(run.metrics["classes"], entry["iou_per_class"], strict=True)
    ]  # fmt: skip


def selection_rows(study: Study) -> Rows:
    """The knockout's effects by how many patches an image must have wrong to count: what the selection decides."""
    rows = []
    for mask, run in study.trained.items():
        most = confused_patches(run)
        for patches in sorted({max(1, round(most * share)) for share in (0, 1 / 8, 1 / 4, 1 / 2, 1, 3 / 2)}):
            cases, effects = read_cases(run, patches), knockout_effects(run, patches)
            for name, (value, resampled) in effects.items():
                low, high = interval(value, resampled)
                row = {"image_attention": mask, "min_patches": patches, "cases": len(cases.images), "effect": name}
                rows.append(row | {"value": value, "low": low, "high": high})
    return rows


def paired_rows(paired: dict[str, Any]) -> Rows:
    """Bidirectional minus causal by site, then of drop-off and recovery."""
    rows = []
    for entry in [*paired["sites"], *paired["effects"]]:
        low, high = entry["ci95"]
        row = {"of": entry.get("site") or entry["effect"], "difference": entry["difference"], "low": low, "high": high}
        rows.append(row | {"p": entry["p"], "p_corrected": entry.get("p_corrected")})
    return rows


def seed_rows(seeds: dict[str, list[dict[str, Any]]]) -> Rows:
    """Spread over probe seeds beside the interval over images, by mask and site."""
    return [
        {"image_attention": mask} | {key: entry[key] for key in entry if key != "ci95"}
        | dict(zip(("low", "high"), entry["ci95"], strict=True))
        for mask, entries in seeds.items()
        for entry in entries
    ]  # fmt: skip
