"""Compare models on the same photos: each with the first, site by site, and the best layer of one with the other's.

Intervals (95%) are of the difference, over the same resamplings of the photos for both models; that of the best layers
holds whichever layers are best. Models of different depth are compared at equal relative depth. One training each: what
another one would change is in no interval. Classes are compared at the best layers, all in one test.

Shapes: S sites, N images, K classes, R resamplings.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import p_values, random_swaps, simultaneous_band
from llava_bidir.common.errors import UserError
from probes.models.sites import is_layer, layer_number
from probes.runs.comparable import check_same_probes
from probes.runs.formatting import Entry, Rows, bounds
from probes.runs.probe_run import ProbeRun
from probes.runs.study import StudyRuns, runs_to_compare
from probes.score.estimate import Estimate

from .verdicts import ALPHA, FAILS, MARGIN, judge

BEST_LAYER = "best layer"


def compare_models(studies: Sequence[StudyRuns]) -> list[Entry]:
    """Return an entry for each model after the first of a dataset, and each mask that both have, in the order given.

    Of models with several seeds, those of one seed are compared.

    Each has "dataset", "image_attention", "has_llm", the names "first" and "second", "images", "groups", "sites" with
    the scores of both and their difference by site, the same of "best" layers, and of the IoU of each class there in
    "classes". "unconverged" lists the sites of either whose solved probe has no certificate.
    "left_out" says why two runs are not compared: their probes were made in different ways.
    """
    entries = []
    references: dict[tuple[str, int | None], StudyRuns] = {}
    for study in studies:
        first = references.setdefault((study.dataset, study.seed), study)
        if first.name == study.name:
            continue
        ours, theirs = runs_to_compare(first, study)
        for mask in [mask for mask in ours if mask in theirs]:
            about = {
                "dataset": study.dataset,
                "image_attention": mask,
                "has_llm": theirs[mask].has_llm,
                "first": first.model,
                "second": study.model,
            }
            try:
                check_same_probes(ours[mask], theirs[mask])
            except UserError as error:
                entries.append(about | {"left_out": str(error)})
            else:
                entries.append(about | compare_runs(ours[mask], theirs[mask]))
    return entries


def compare_runs(first: ProbeRun, second: ProbeRun) -> Entry:
    """Return the differences of two runs on the same images, the second minus the first; see :func:`compare_models`."""
    scores = [run.site_scores() for run in (first, second)]
    sites = [
        {"site": site, "second_site": other} | _compare_estimates(scores[0][site], scores[1][other])
        for site, other in pair_sites(first, second)
    ]
    groups = first.groups
    entry: Entry = {
        "images": first.metrics["images"],
        "groups": None if groups is None else len(torch.unique(groups)),
        "sites": sites,
        "best": None,
        "classes": [],
        "unconverged": {"first": unconverged_sites(first), "second": unconverged_sites(second)},
    }
    if first.peak_layer is None or second.peak_layer is None:
        return entry
    of_layers = [[score for site, score in of_run.items() if is_layer(site)] for of_run in scores]
    names = {"site": first.peak_layer, "second_site": second.peak_layer}
    entry["best"] = names | difference_of_best(*of_layers)
    entry["classes"] = compare_classes(first, second)
    return entry


def unconverged_sites(run: ProbeRun) -> list[str]:
    """Return the sites whose solved probe has no certificate of convergence; [] of trained probes."""
    if not run.is_solved:
        return []
    chosen = run.strengths.neighbours()["chosen"]
    return [
        site for i, site in enumerate(run.sites) if not run.strengths.has_converged(chosen, [i])
    ]


def pair_sites(first: ProbeRun, second: ProbeRun) -> list[tuple[str, str]]:
    """Return the sites of both runs that are compared: of one name, and of layers those of equal relative depth.

    A layer is compared with that layer of the other model whose depth is nearest, if it was probed.
    """
    others = [site for site in second.sites if is_layer(site)]
    pairs = []
    for site in first.sites:
        if not is_layer(site):
            pairs += [(site, site)] if site in second.sites else []
        elif others:
            depth = layer_number(site) / layer_number(first.last_layer)
            wanted = depth * layer_number(second.last_layer)  # among the other model's layers
            nearest = min(others, key=lambda other: abs(layer_number(other) - wanted))
            if abs(layer_number(nearest) - wanted) <= 0.5:
                pairs.append((site, nearest))
    return pairs


def difference_of_best(first: Sequence[Estimate], second: Sequence[Estimate]) -> Entry:
    """Return the difference of the best of the second scores and the best of the first, with a 95% interval.

    The interval holds whichever are best: with bounds on all differences D of one score and another together, the
    difference of maxima, max min D, is between the max min of the lower bounds and that of the upper ones. An interval
    of the two that are best on these images says of equal models up to twice too often that they differ, and one of
    layers that cross-validation has chosen up to six times (`experiments/statistics/model_pairs.py`).

    Args:
        first: Scores of one model's layers, from the same resamplings as those of the other's.
        second: Of the other's.
    """
    vectors = [torch.stack([score.vector for score in scores], 1) for scores in (first, second)]
    differences = vectors[1][:, :, None] - vectors[0][:, None, :]  # [1 + R, layers, layers]
    low, high = simultaneous_band(differences[0].flatten(), differences[1:].flatten(1))
    best = [max(score.value for score in scores) for scores in (first, second)]
    return {
        "first": best[0],
        "second": best[1],
        "difference": best[1] - best[0],
        "ci95": [
            bound.view_as(differences[0]).amin(1).amax().item()  # max min
            for bound in (low, high)
        ],
    }


def _class_ious(run: ProbeRun, site: str) -> Tensor:
    """Return the IoU of each class at a site, f64[1 + R, K]: of the dataset, then of its resamplings.

    NaN where a class is neither labelled nor predicted.
    """
    read = run.sums_at([site])[0].double()  # [N, M]
    weights = torch.cat([torch.ones(1, len(read)), run.weights]).double()
    return run.task.iou(weights @ read)


def _compare_estimates(first: Estimate, second: Estimate) -> Entry:
    difference = second - first
    return {
        "first": first.value,
        "second": second.value,
        "difference": difference.value,
        "ci95": difference.ci95,
    }


def compare_classes(first: ProbeRun, second: ProbeRun) -> list[Entry]:
    """Return the differences of IoU by class at the best layers, with p-values corrected for their number.

    Each is tested against exchanges of the two models, photo by photo, together with all other classes (max-T): of
    equal models, one pair in 20 has a class with a p-value below 0.05, also where classes are in a handful of photos,
    of which bootstrap intervals cover too little. A class that is neither labelled nor predicted is left out.
    """
    runs = (first, second)
    ours, theirs = (run.sums_at([run.peak_layer])[0].double() for run in runs)  # [N, M]
    swaps = random_swaps(len(ours), groups=first.groups).double()
    moved = swaps @ (theirs - ours)
    iou = first.task.iou
    swapped = iou(theirs.sum(0) - moved) - iou(ours.sum(0) + moved)  # [1 + R, K]
    known = (~swapped[0].isnan()).nonzero().flatten().tolist()
    if not known:
        return []
    corrected = p_values(swapped[:, known].nan_to_num())[1].tolist()
    drawn = [_class_ious(run, run.peak_layer) for run in runs]
    entries = []
    for k, p in zip(known, corrected, strict=True):
        scores = [Estimate.from_vector(x[:, k].nan_to_num()) for x in drawn]
        about = {"class": first.metrics["classes"][k]}
        entries.append(about | _compare_estimates(*scores) | {"p_corrected": p})
    return entries


def class_differs(entry: Entry) -> bool:
    """Return whether a class is said to differ: its difference is a finding, also beside those of all other classes."""
    return differs(entry) and entry["p_corrected"] < ALPHA


def differs(entry: Entry) -> bool:
    """Return whether a difference is a finding: its interval excludes 0, and it is a point of mIoU or more."""
    return judge(1, entry["difference"], entry["ci95"], MARGIN) != FAILS


def comparison_rows(entries: Sequence[Entry]) -> Rows:
    """Return a row for each number of the comparisons: of sites, best layers, and classes at these."""
    rows: Rows = []
    for entry in entries:
        if "left_out" in entry:
            continue
        about = {key: entry[key] for key in ("dataset", "image_attention")}
        about |= {"first_model": entry["first"], "second_model": entry["second"]}
        numbers = [({"of": x["site"]}, x) for x in entry["sites"]]
        if entry["best"]:
            numbers.append(({"of": BEST_LAYER}, entry["best"]))
        numbers += [({"of": f"IoU of {x['class']}"}, x) for x in entry["classes"]]
        for of, x in numbers:
            row = about | of
            row |= {"first_site": x.get("site"), "second_site": x.get("second_site")}
            row |= {key: x[key] for key in ("first", "second", "difference")}
            rows.append(row | bounds(x["ci95"]) | {"p_corrected": x.get("p_corrected")})
    return rows


def comparisons_in_points(entries: Sequence[Entry]) -> list[Entry]:
    """Return the differences of two models, b minus a, in points: of sites, then best layers, then classes at these.

    Each has "dataset", "image_attention", "of" ("site", "best layer" or "class"), the names "a" and "b", "site_a",
    "site_b", "value" and "ci95"; that of a class also "class" and "p_corrected".
    """
    found = []
    for entry in entries:
        if "left_out" in entry:
            continue
        about = {key: entry[key] for key in ("dataset", "image_attention")}
        best = [entry["best"]] if entry["best"] else []
        for of, numbers in (
            ("site", entry["sites"]),
            (BEST_LAYER, best),
            ("class", entry["classes"]),
        ):
            for x in numbers:
                at = entry["best"] if of == "class" else x
                row = about | {
                    "of": of,
                    "a": entry["first"],
                    "b": entry["second"],
                }
                row |= {"site_a": at["site"], "site_b": at["second_site"]}
                row |= {key: x[key] for key in ("class", "p_corrected") if key in x}
                ci95 = [100 * bound for bound in x["ci95"]]
                found.append(row | {"value": 100 * x["difference"], "ci95": ci95})
    return found
