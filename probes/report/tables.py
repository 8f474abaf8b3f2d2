"""Build the tables of a study, next to the numbers of the paper."""

from probes.models.sites import FINAL_NORM
from probes.runs.formatting import Rows, run_columns
from probes.runs.paper import PAPER
from probes.runs.study import StudyRuns

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
