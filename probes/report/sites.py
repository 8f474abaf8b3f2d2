"""Rows by site: scores beside those of random models, draws, classes and certificates.

The adapter is compared with random adapters, the layers of the LLM with random and permuted LLMs, those of a bare
encoder with random and permuted encoders. A part of a random model that is not random equals the trained one's, and has
nothing to compare with.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

from probes.analyses.analysis import table_row
from probes.models.sites import ADAPTER, FINAL_NORM, PATCHES, is_layer, layer_around
from probes.runs.formatting import PAPER, Entry
from probes.runs.read import ProbeRun
from probes.runs.study import CONTROLS, PAPER_MASKS, StudyRuns, runs_to_compare
from probes.score.estimate import Estimate
from probes.score.strengths import is_at_end
from probes.tasks import SEGMENTATION

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
    main_runs = list(shown_runs(study).values())
    compared = compare_sites(study)
    for run in study.members:
        is_main = any(run is main_run for main_run in main_runs)
        columns = run_columns(study, run, key)
        columns["main"] = is_main
        for entry in run.metrics["sites"]:
            site = entry["site"]
            for metric in run.task.scores:
                interval = entry[f"{metric}_ci95"]
                row = table_row(site, metric=metric, value=entry[metric], interval=interval)
                if is_main and metric == run.task.score:
                    row |= compared.get((run.mask, site), {})
                yield columns | row


def compare_sites(study: StudyRuns) -> dict[tuple[str, str], Entry]:
    """Return "random", "draws", "minus_random", "minus_low" and "minus_high" by mask and site.

    The difference is the score minus the mean of the draws, paired over images. Of random and permuted models it is the
    smaller one, and the interval over images and draws covers those of both.
    """
    main_runs = shown_runs(study)
    scores_of_draws = {}
    for mask, control in product(main_runs, PART_OF):
        runs = random_runs(study, control, mask)
        scores_of_draws[mask, control] = [run.site_scores for run in runs]
    sites = dict.fromkeys(site for run in main_runs.values() for site in run.sites)
    columns = {}
    for site in sites:
        compared = {}
        for (mask, control), draws in scores_of_draws.items():
            trained = main_runs[mask].site_scores
            numbers = [of_draw[site] for of_draw in draws if site in of_draw]
            if numbers and site in trained and PART_OF[control] == random_part(site):
                compared[mask, control] = compare_to_draws(trained[site], numbers)
        for mask, _ in compared:
            columns[mask, site] = _beyond_draws(mask, compared, is_pooled=site != ADAPTER)
    return columns


def _beyond_draws(
    mask: str, compared: Mapping[tuple[str, str], Estimate], *, is_pooled: bool
) -> Entry:
    """Return the difference of a site from random models, from those by mask and control.

    The variance of draws is pooled over masks and controls, but of random adapters, which are the same under all masks.
    Without two degrees of freedom there is no interval.
    """
    of_mask = {}
    for key, estimate in compared.items():
        if key[0] == mask:
            of_mask[key] = estimate
    nearest = min(of_mask.values(), key=lambda estimate: abs(estimate.value))
    row = {
        "random": nearest.about["trained"] - nearest.value,
        "draws": sum(_count_draws(estimate) for estimate in of_mask.values()),
        "minus_random": nearest.value,
    }
    drawn = {}
    for key, estimate in compared.items():
        if _count_draws(estimate) > 1:
            drawn[key] = estimate
    lows = []
    highs = []
    for key in of_mask:
        others = []
        if is_pooled:
            others = [estimate for other, estimate in drawn.items() if other != key]
        freedom = 0
        if key in drawn:
            (low, high), (_, freedom) = interval_over_draws(drawn[key], others)
        if freedom < MIN_FREEDOM:
            return row
        lows.append(low)
        highs.append(high)
    return row | {"minus_low": min(lows), "minus_high": max(highs)}


def _count_draws(compared: Estimate) -> int:
    return len(compared.about["by_draw"])


def random_runs(study: StudyRuns, control: str, mask: str) -> list[ProbeRun]:
    """Return the draws of a control; those of an adapter serve all masks, which it does not depend on."""
    first = next(iter(shown_runs(study).values()))
    draws = study.draws(control, solved=first.is_solved)
    if control != "adapter":
        return [draw[mask] for draw in draws if mask in draw]
    runs = []
    for draw in draws:
        (any_mask, *_) = draw.values()
        runs.append(draw.get(mask, any_mask))
    return runs


def random_part(site: str) -> str:
    """Return what must be random for a site to have other states than the trained model's; "" if nothing does it."""
    around = layer_around(site)
    if around == FINAL_NORM or (is_layer(around) and around != PATCHES):
        return "llm"
    if site == ADAPTER:
        return "adapter"
    return ""


def draw_rows(study: StudyRuns, key: str) -> Iterator[Entry]:
    """Yield the main score of each draw of random weights at the sites that these change."""
    score = study.task.score
    for mask, (control, part) in product(shown_runs(study), PART_OF.items()):
        for run in random_runs(study, control, mask):
            columns = run_columns(study, run, key)
            columns |= {"mask": mask, "weights": control}
            for entry in run.metrics["sites"]:
                site = entry["site"]
                if random_part(site) == part:
                    yield columns | table_row(site, score, entry[score])


def class_rows(study: StudyRuns, key: str) -> Iterator[Entry]:
    """Yield the IoU of each class at each site, and in how many photos it is labelled."""
    if study.task.name != SEGMENTATION:
        return
    for run in shown_runs(study).values():
        columns = run_columns(study, run, key)
        photos = run.units_by_class
        for entry in run.metrics["sites"]:
            ious = entry["iou_per_class"]
            for name, iou, count in zip(run.metrics["classes"], ious, photos, strict=True):
                of_class = {"class": name, "iou": iou, "photos": count}
                yield columns | {"site": entry["site"]} | of_class


def certificates_of(run: ProbeRun) -> Iterator[Entry]:
    """Yield site, strength, at_end, gradient and converged of each solved probe of a run."""
    if not run.is_solved:
        return
    for entry in run.strengths.sites:
        strengths = entry["strengths"]
        certificate = {}
        if entry.get("certificates"):
            chosen = strengths.index(entry["chosen"])
            certificate = entry["certificates"][chosen] or {}
        yield {
            "site": entry["site"],
            "strength": entry["chosen"],
            "at_end": is_at_end(strengths, entry["lowest"]),
            "gradient": certificate.get("gradient"),
            "converged": certificate.get("converged"),
        }


def selection_rows(study: StudyRuns, run: ProbeRun) -> Iterator[Entry]:
    """Yield what choosing the best validation adds to each trained probe of a run, beside the optimum's number."""
    score = run.task.score
    optimum: dict[str, float] = {}
    for other in study.members:
        same = (other.mask, other.arm, other.draw) == (run.mask, run.arm, run.draw)
        if same and other.is_solved and other.task_name == run.task_name:
            optimum = {entry["site"]: entry[score] for entry in other.metrics["sites"]}
    for entry in run.metrics["sites"]:
        if "selection" in entry and len(entry["history"]) > 1:
            yield {
                "site": entry["site"],
                "metric": score,
                "optimum": optimum.get(entry["site"]),
                "best": entry[score],
                "last": entry["last"],
                "validations": len(entry["history"]),
                "selection": entry["selection"],
            }


def table2(studies: Sequence[StudyRuns]) -> list[Entry]:
    """Return Table 2 (encoder, adapter, peak layer, gains): rows of the runs, then of the paper; [] without an LLM."""
    scores = (*SUMMARY, FINAL_NORM)
    rows = []
    for study in studies:
        if not study.first.has_llm:
            continue
        for run in study.main_runs.values():
            row = {"model": study.title, "image_attention": run.mask, "probes": run.probe_kind}
            for score in scores:
                row[score] = run.metrics["summary"].get(score)
            rows.append(row)
    if not rows:
        return []
    paper = PAPER["table2_ade20k_miou"]
    for encoder, mask in product(("clip", "dinov2", "siglip"), PAPER_MASKS):
        of_encoder = paper[encoder]
        percents = (of_encoder["encoder"], *of_encoder[mask])
        row = {
            "model": f"paper, {encoder}, ADE20K",
            "image_attention": mask,
            "probes": "trained",
            FINAL_NORM: None,
        }
        for score, percent in zip(SUMMARY, percents, strict=True):
            row[score] = percent / 100
        rows.append(row)
    return rows
