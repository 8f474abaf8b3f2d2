"""Rows by site: scores beside those of random models, draws, classes and certificates.

The adapter is compared with random adapters, the layers of the LLM with random and permuted LLMs, those of a bare
encoder with random and permuted encoders. A part of a random model that is not random equals the trained one's, and has
nothing to compare with.
"""

from collections.abc import Iterator, Mapping, Sequence

from probes.analyses.analysis import table_row
from probes.models.sites import ADAPTER, FINAL_NORM, PATCHES, is_layer, layer_around
from probes.runs.formatting import PAPER, Entry
from probes.runs.read import ProbeRun
from probes.runs.study import CONTROLS, MASKS, StudyRuns, runs_to_compare
from probes.score.estimate import Estimate
from probes.score.strengths import is_at_end
from probes.tasks import SEGMENTATION

from .compare import photos_of_classes
from .verdicts import compare_to_draws, interval_over_draws

SUMMARY = ("encoder", "adapter", "peak_llm", "delta_enc", "recovery")  # of Table 2
PART_OF = {control: part for part, controls in CONTROLS.items() for control in controls}
MIN_FREEDOM = 2  # of draws: an interval from one is twelve standard errors wide


def shown_runs(study: StudyRuns) -> dict[str, ProbeRun]:
    """Return the trained model's runs that the report is about, by mask: solved ones where all masks have them."""
    return runs_to_compare(study)[0]


def run_columns(study: StudyRuns, run: ProbeRun, key: str) -> Entry:
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


def site_rows(study: StudyRuns, key: str) -> Iterator[Entry]:
    """Yield a row for each run, site and score; see :class:`probes.report.tables.Tables`."""
    shown = shown_runs(study).values()
    compared = compare_sites(study)
    for run in study.members:
        is_main = any(run is main for main in shown)
        about = run_columns(study, run, key) | {"main": is_main}
        for entry in run.metrics["sites"]:
            for metric in run.task.scores:
                row = about | table_row(
                    entry["site"],
                    metric=metric,
                    value=entry[metric],
                    interval=entry[f"{metric}_ci95"],
                )
                if is_main and metric == run.task.score:
                    row |= compared.get((run.mask, entry["site"]), {})
                yield row


def compare_sites(study: StudyRuns) -> dict[tuple[str, str], Entry]:
    """Return "random", "draws", "minus_random", "minus_low" and "minus_high" by mask and site.

    The difference is the score minus the mean of the draws, paired over images. Of random and permuted models it is the
    smaller one, and the interval over images and draws covers those of both.
    """
    found = {}
    shown = shown_runs(study)
    own = {mask: run.site_scores for mask, run in shown.items()}
    scores = {
        (mask, control): [run.site_scores for run in random_runs(study, control, mask)]
        for mask in shown
        for control in PART_OF
    }
    for site in dict.fromkeys(site for run in shown.values() for site in run.sites):
        compared = {}
        for (mask, control), draws in scores.items():
            numbers = [of_draw[site] for of_draw in draws if site in of_draw]
            if numbers and site in own[mask] and PART_OF[control] == random_part(site):
                compared[mask, control] = compare_to_draws(own[mask][site], numbers)
        for mask, _ in compared:
            found[mask, site] = _beyond_draws(mask, compared, is_pooled=site != ADAPTER)
    return found


def _beyond_draws(
    mask: str, compared: Mapping[tuple[str, str], Estimate], *, is_pooled: bool
) -> Entry:
    """Return the difference of a site from random models, from those by mask and control.

    The variance of draws is pooled over masks and controls, but of random adapters, which are the same under all masks.
    Without two degrees of freedom there is no interval.
    """
    own = {key: x for key, x in compared.items() if key[0] == mask}
    nearest = min(own.values(), key=lambda x: abs(x.value))
    row = {
        "random": nearest.about["trained"] - nearest.value,
        "draws": sum(len(x.about["by_draw"]) for x in own.values()),
        "minus_random": nearest.value,
    }
    drawn = {key: x for key, x in compared.items() if len(x.about["by_draw"]) > 1}
    intervals = []
    for key in own:
        others = [x for other, x in drawn.items() if other != key and is_pooled]
        freedom = 0
        if key in drawn:
            ci95, (_, freedom) = interval_over_draws(drawn[key], others)
        if freedom < MIN_FREEDOM:
            return row
        intervals.append(ci95)
    lows, highs = zip(*intervals, strict=True)
    return row | {"minus_low": min(lows), "minus_high": max(highs)}


def random_runs(study: StudyRuns, control: str, mask: str) -> list[ProbeRun]:
    """Return the draws of a control; those of an adapter serve all masks, which it does not depend on."""
    is_solved = next(iter(shown_runs(study).values())).is_solved
    draws = study.draws(control, solved=is_solved)
    if control != "adapter":
        return [draw[mask] for draw in draws if mask in draw]
    return [draw.get(mask) or next(iter(draw.values())) for draw in draws]


def random_part(site: str) -> str:
    """Return what must be random for a site to have other states than the trained model's; "" if nothing does it."""
    around = layer_around(site)
    if around == FINAL_NORM or (is_layer(around) and around != PATCHES):
        return "llm"
    return "adapter" if site == ADAPTER else ""


def draw_rows(study: StudyRuns, key: str) -> Iterator[Entry]:
    """Yield the main score of each draw of random weights at the sites that these change."""
    score = study.task.score
    for mask in shown_runs(study):
        for control, part in PART_OF.items():
            for run in random_runs(study, control, mask):
                about = run_columns(study, run, key) | {"mask": mask, "weights": control}
                for entry in run.metrics["sites"]:
                    if random_part(entry["site"]) == part:
                        yield about | table_row(entry["site"], score, entry[score])


def class_rows(study: StudyRuns, key: str) -> Iterator[Entry]:
    """Yield the IoU of each class at each site, and in how many photos it is labelled."""
    for run in shown_runs(study).values() if study.task.name == SEGMENTATION else ():
        about = run_columns(study, run, key)
        photos = photos_of_classes(run)
        for entry in run.metrics["sites"]:
            named = zip(run.metrics["classes"], entry["iou_per_class"], photos, strict=True)
            for name, iou, count in named:
                yield about | {"site": entry["site"], "class": name, "iou": iou, "photos": count}


def certificates_of(run: ProbeRun) -> Iterator[Entry]:
    """Yield site, strength, at_end, gradient and converged of each solved probe of a run."""
    for entry in run.strengths.sites if run.is_solved else ():
        chosen = entry["strengths"].index(entry["chosen"])
        certificate = (entry.get("certificates") or {chosen: None})[chosen] or {}
        yield {
            "site": entry["site"],
            "strength": entry["chosen"],
            "at_end": is_at_end(entry["strengths"], entry["lowest"]),
            "gradient": certificate.get("gradient"),
            "converged": certificate.get("converged"),
        }


def table2(studies: Sequence[StudyRuns]) -> list[Entry]:
    """Return Table 2 (encoder, adapter, peak layer, gains): rows of the runs, then of the paper; [] without an LLM."""
    columns = ("model", "image_attention", "probes", *SUMMARY, FINAL_NORM)
    rows = []
    for study in studies:
        for run in study.main_runs.values() if study.first.has_llm else ():
            scores = map(run.metrics["summary"].get, columns[3:])
            rows.append((study.title, run.mask, run.probe_kind, *scores))
    paper = PAPER["table2_ade20k_miou"]
    for encoder in ("clip", "dinov2", "siglip") if rows else ():
        for mask in MASKS:
            values = (paper[encoder]["encoder"], *paper[encoder][mask])
            scores = [x / 100 for x in values]
            rows.append((f"paper, {encoder}, ADE20K", mask, "trained", *scores, None))
    return [dict(zip(columns, row, strict=True)) for row in rows]
