"""Rows by site: scores beside those of random models, draws, classes and certificates.

The adapter is compared with random adapters, the layers of the LLM with random and permuted LLMs, those of a bare
encoder with random and permuted encoders. A part of a random model that is not random equals the trained one's, and has
nothing to compare with.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from probes.models.sites import ADAPTER, FINAL_NORM, PATCHES, is_layer, layer_around
from probes.runs.finished_run import FinishedRun
from probes.runs.paper import PAPER
from probes.runs.study import CONTROLS, MASKS, StudyRuns, runs_to_compare
from probes.score.estimate import Estimate
from probes.score.strengths import is_at_end
from probes.tasks import SEGMENTATION

from .compare import photos_of_classes
from .verdicts import compare_to_draws, interval_over_draws

Row = dict[str, Any]
SUMMARY = ("encoder", "adapter", "peak_llm", "delta_enc", "recovery")  # of Table 2
MIN_FREEDOM = (
    2  # of the draws; an interval from one degree of freedom is twelve standard errors wide
)


def shown_runs(study: StudyRuns) -> dict[str, FinishedRun]:
    """Return the trained model's runs that the report is about, by mask: solved ones where all masks have them."""
    return runs_to_compare(study)[0]


def run_columns(study: StudyRuns, run: FinishedRun, key: str) -> Row:
    """Return the columns that tell runs apart."""
    return {
        "model": key,
        "mask": run.mask,
        "task": run.task_name,
        "data": study.dataset,
        "weights": run.arm,
        "draw": None if run.arm == "trained" else run.draw,
        "seed": run.metrics["seed"],
        "probes": run.probe_kind,
    }


def site_rows(study: StudyRuns, key: str) -> Iterator[Row]:
    """Yield a row for each run, site and score; see :class:`probes.report.tables.Tables`."""
    shown = shown_runs(study)
    compared = compare_sites(study)
    for run in study.members:
        is_main = any(run is main for main in shown.values())
        for entry in run.metrics["sites"]:
            for metric in run.task.scores:
                row = run_columns(
                    study,
                    run,
                    key,
                ) | {
                    "main": is_main,
                    "site": entry["site"],
                }
                row |= {
                    "metric": metric,
                    "value": entry[metric],
                }
                row["low"], row["high"] = entry[f"{metric}_ci95"]
                if is_main and metric == run.task.score:
                    row |= compared.get((run.mask, entry["site"]), {})
                yield row


def compare_sites(study: StudyRuns) -> dict[tuple[str, str], Row]:
    """Return "random", "draws", "minus_random", "minus_low" and "minus_high" by mask and site.

    The difference is the score minus the mean of the draws, paired over images. Of random and permuted models it is the
    smaller one, and the interval over images and draws covers those of both. The variance of draws is pooled over masks
    and both kinds; without two degrees of freedom there is no interval.
    """
    compared: dict[tuple[str, str, str], Estimate] = {}
    shown = shown_runs(study)
    for mask, run in shown.items():
        own = run.site_scores()
        for control in {*CONTROLS["llm"], *CONTROLS["adapter"]}:
            scores = [
                draw.site_scores()
                for draw in random_runs(
                    study,
                    control,
                    mask,
                )
            ]
            for site in run.sites:
                numbers = [of[site] for of in scores if site in of]
                if control in CONTROLS.get(random_part(site), ()) and numbers:
                    compared[mask, site, control] = compare_to_draws(own[site], numbers)
    return {
        (mask, site): _beyond_draws(
            mask,
            site,
            compared,
        )
        for mask, run in shown.items()
        for site in run.sites
        if any((mask, site, control) in compared for control in CONTROLS.get(random_part(site), ()))
    }


def _beyond_draws(mask: str, site: str, compared: dict[tuple[str, str, str], Estimate]) -> Row:
    controls = CONTROLS[random_part(site)]
    own = {c: compared[mask, site, c] for c in controls if (mask, site, c) in compared}
    nearest = min(own.values(), key=lambda x: abs(x.value))
    row = {
        "random": nearest.about["trained"] - nearest.value,
        "draws": sum(len(x.about["by_draw"]) for x in own.values()),
        "minus_random": nearest.value,
    }
    intervals = []
    for control, estimate in own.items():
        # random adapters are the same under all masks
        others = [
            x
            for (other, at, kind), x in compared.items()
            if at == site and site != ADAPTER and (other, kind) != (mask, control)
        ]
        drawn = [x for x in others if len(x.about["by_draw"]) > 1]
        if len(estimate.about["by_draw"]) < 2:
            return row
        ci95, (_, freedom) = interval_over_draws(estimate, drawn)
        if freedom < MIN_FREEDOM:
            return row
        intervals.append(ci95)
    lows, highs = zip(*intervals, strict=True)
    return row | {
        "minus_low": min(lows),
        "minus_high": max(highs),
    }


def random_runs(study: StudyRuns, control: str, mask: str) -> list[FinishedRun]:
    """Return the draws of a control; those of an adapter serve all masks, which it does not depend on."""
    solved = next(iter(shown_runs(study).values())).is_solved
    draws = study.draws(control, solved=solved)
    if control != "adapter":
        return [draw[mask] for draw in draws if mask in draw]
    return [draw.get(mask) or next(iter(draw.values())) for draw in draws]


def random_part(site: str) -> str:
    """Return what must be random for a site to have other states than the trained model's; "" if nothing does it."""
    around = layer_around(site)
    if around == FINAL_NORM or (is_layer(around) and around != PATCHES):
        return "llm"
    return "adapter" if site == ADAPTER else ""


def draw_rows(study: StudyRuns, key: str) -> Iterator[Row]:
    """Yield the main score of each draw of random weights at the sites that these change."""
    score = study.task.score
    for mask in shown_runs(study):
        for part, controls in CONTROLS.items():
            for control in controls:
                for run in random_runs(
                    study,
                    control,
                    mask,
                ):
                    about = run_columns(
                        study,
                        run,
                        key,
                    ) | {
                        "mask": mask,
                        "weights": control,
                    }
                    for entry in run.metrics["sites"]:
                        if random_part(entry["site"]) == part:
                            yield about | {
                                "site": entry["site"],
                                "metric": score,
                                "value": entry[score],
                            }


def class_rows(study: StudyRuns, key: str) -> Iterator[Row]:
    """Yield the IoU of each class at each site, and in how many photos it is labelled."""
    if study.task.name != SEGMENTATION:
        return
    for run in shown_runs(study).values():
        photos = photos_of_classes(run)
        for entry in run.metrics["sites"]:
            for name, iou, count in zip(
                run.metrics["classes"],
                entry["iou_per_class"],
                photos,
                strict=True,
            ):
                about = run_columns(
                    study,
                    run,
                    key,
                )
                yield about | {
                    "site": entry["site"],
                    "class": name,
                    "iou": iou,
                    "photos": count,
                }


def certificate_rows(run: FinishedRun) -> Iterator[Row]:
    """Yield how each solved probe was found: its strength of regularisation, and how far it is from the minimum."""
    for entry in run.site_strengths if run.is_solved else ():
        chosen = entry["strengths"].index(entry["chosen"])
        certificate = (entry.get("certificates") or {chosen: None})[chosen] or {}
        yield {
            "site": entry["site"],
            "strength": entry["chosen"],
            "at_end": is_at_end(entry["strengths"], entry["lowest"]),
            "gradient": certificate.get("gradient"),
            "converged": certificate.get("converged"),
        }


def table2(studies: Sequence[StudyRuns]) -> list[Row]:
    """Return Table 2 (encoder, adapter, peak layer, gains): rows of the runs, then of the paper; [] without an LLM."""
    rows = []
    for study in studies:
        for mask, run in study.main_runs.items() if study.first.has_llm else ():
            scores = {entry["site"]: entry["miou"] for entry in run.metrics["sites"]}
            row = {
                "model": study.title,
                "image_attention": mask,
                "probes": run.probe_kind,
            }
            row |= {key: run.metrics["summary"][key] for key in SUMMARY}
            rows.append(row | {FINAL_NORM: scores.get(FINAL_NORM)})
    papers = [(encoder, mask) for encoder in ("clip", "dinov2", "siglip") for mask in MASKS]
    for encoder, mask in papers if rows else ():
        numbers = PAPER["table2_ade20k_miou"][encoder]
        values = [value / 100 for value in (numbers["encoder"], *numbers[mask])]
        row = {
            "model": f"paper, {encoder}, ADE20K",
            "image_attention": mask,
            "probes": "trained",
        }
        rows.append(
            row
            | dict(
                zip(
                    SUMMARY,
                    values,
                    strict=True,
                )
            )
        )
    return rows
