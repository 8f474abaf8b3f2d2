"""Compare runs on the same images, the second minus the first: sites, best layers, effects and classes in one table.

Two masks of a model and two models are compared alike. Intervals (95%) are of differences over the same resamplings of
the images; that of the best layers holds whichever layers are best. p-values come from exchanging the two runs image by
image, corrected for the number of sites or of classes (max-T). Layers of models of other depth are compared at equal
relative depth. One training each: what another one would change is in no interval.

Shapes: S sites, N images, K classes, R resamplings, P permutations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import RESAMPLINGS, p_values, random_swaps
from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER, ENCODER, is_encoder_layer, is_layer, layer_number
from probes.runs.compare import check_same_probes
from probes.runs.formatting import Entry
from probes.runs.read import ProbeRun
from probes.runs.study import StudyRuns, runs_to_compare
from probes.score.effects import EFFECTS
from probes.score.estimate import Estimate
from probes.tasks import SEGMENTATION, Task

from .best_layers import BEST_LAYER, correct_for_pairs, difference_of_best, find_difference
from .verdicts import detectable

LEFT_OUT = "left out"
FEWEST_PHOTOS = 6  # exchanging fewer can reject nothing: 2 ** (1 - 5) > 0.05


@dataclass(frozen=True)
class RunPair:
    """Two runs that are compared.

    Args:
        first: The run that is subtracted.
        second: The other one.
        columns: Columns of the table of differences that say which they are.
        only_best: Compare their best layers alone.
    """

    first: ProbeRun
    second: ProbeRun
    columns: Entry
    only_best: bool = False


def difference_rows(studies: Sequence[StudyRuns], keys: dict[str, str]) -> list[Entry]:
    """Return the rows of the table of differences, see :class:`probes.report.tables.Tables`.

    Each model is compared with the first one of its task, data and seed, under each mask that both have; and each mask
    of a model with its first one. Of all other pairs, the best layers are compared.

    Args:
        studies: In the order given.
        keys: Keys of models by name.
    """
    rows = []
    for pair in pairs_of_studies(studies, keys):
        try:
            check_same_probes(pair.first, pair.second)
        except UserError as error:
            rows.append(pair.columns | {"of": LEFT_OUT, "name": str(error)})
            continue
        compare = compare_runs
        if pair.only_best:
            compare = compare_best_layers
        for row in compare(pair.first, pair.second):
            rows.append(pair.columns | row)
    correct_for_pairs(rows)
    return rows


def pairs_of_studies(studies: Sequence[StudyRuns], keys: dict[str, str]) -> Iterator[RunPair]:
    """Yield the pairs with the first model and of masks by study, then those of other models."""
    comparable: dict[tuple, list[StudyRuns]] = {}
    for study in studies:
        about = study.task.name, study.dataset, study.seed
        earlier = comparable.setdefault(about, [])
        if earlier:
            yield from pairs_of_models(earlier[0], study, keys)
        yield from pairs_of_masks(study, keys)
        earlier.append(study)
    for group in comparable.values():
        for first, second in combinations(group[1:], 2):
            for pair in pairs_of_models(first, second, keys):
                yield replace(pair, only_best=True)


def pairs_of_models(first: StudyRuns, second: StudyRuns, keys: dict[str, str]) -> Iterator[RunPair]:
    """Yield the runs of two models under each mask that both have; without one, those under their first masks."""
    if first.name == second.name:
        return
    runs_of_first, runs_of_second = runs_to_compare(first, second)
    columns = _columns(second) | {
        "between": "models",
        "first": keys[first.name],
        "second": keys[second.name],
    }
    shared = [mask for mask in runs_of_first if mask in runs_of_second]
    for mask in shared:
        yield RunPair(runs_of_first[mask], runs_of_second[mask], columns=columns | {"mask": mask})
    if not shared:
        pair = [next(iter(runs.values())) for runs in (runs_of_first, runs_of_second)]
        masks = ", ".join(run.mask for run in pair)
        yield RunPair(*pair, columns=columns | {"mask": masks}, only_best=True)


def pairs_of_masks(study: StudyRuns, keys: dict[str, str]) -> Iterator[RunPair]:
    """Yield the runs of a model under its first mask and each other one, then those of other masks."""
    (runs,) = runs_to_compare(study)
    masks = list(runs)
    for first, second in combinations(masks, 2):
        columns = _columns(study) | {
            "between": "masks",
            "model": keys[study.name],
            "first": first,
            "second": second,
        }
        is_other = first != masks[0]
        yield RunPair(runs[first], runs[second], columns=columns, only_best=is_other)


def _columns(study: StudyRuns) -> Entry:
    return {"task": study.task.name, "data": study.dataset, "seed": study.seed}


def compare_runs(
    first: ProbeRun, second: ProbeRun, permutations: int = RESAMPLINGS
) -> Iterator[Entry]:
    """Yield a row for each difference; "of" is "site", "effect", "best layer" or "class"."""
    task = first.task
    ours = first.site_scores
    theirs = second.site_scores
    images = first.metrics["images"]
    swaps = random_swaps(images, permutations, groups=first.groups).double()
    pairs = pair_sites(first, second)
    p_of = {}
    for is_tested in (has_depth, is_encoder_layer):  # an encoder's own layers are a second family
        tested = [pair for pair in pairs if is_tested(pair[0])]
        p_of |= _test_sites(first, second=second, pairs=tested, swaps=swaps)
    for pair in pairs:
        site, other = pair
        row = _row("site", site, task, ours[site], theirs[other], *pair)
        yield row | tested_columns(
            task,
            theirs[other] - ours[site],
            p=p_of.get(pair),
            counts=(first.units, first.units_of_class),
        )
    for name in EFFECTS:
        if name in first.effects and name in second.effects:
            yield _row(
                "effect",
                name=name,
                task=task,
                first=first.effects[name],
                second=second.effects[name],
            )
    yield from compare_best_layers(first, second)
    if first.peak_layer and second.peak_layer and task.name == SEGMENTATION:
        best = (first.peak_layer, second.peak_layer)
        yield from compare_classes(first, second=second, sites=best, swaps=swaps)


def compare_best_layers(first: ProbeRun, second: ProbeRun) -> Iterator[Entry]:
    """Yield the row of the best layers, of a run without probed layers of its best site."""
    scores = []
    best = []
    for run in (first, second):
        sites = [*filter(is_layer, run.site_scores)] or [
            site for site in run.site_scores if has_depth(site) or is_encoder_layer(site)
        ]
        if not sites:
            return
        scores.append([run.site_scores[site] for site in sites])
        best.append(max(sites, key=lambda site: run.task.sign * run.site_scores[site].value))
    difference = difference_of_best(
        first.task.sign, *scores, counts=(first.units, first.units_of_class)
    )
    named = {"of": BEST_LAYER, "name": BEST_LAYER, "site": best[0], "second_site": best[1]}
    yield named | difference.row(first.task, first.units)


def has_depth(site: str) -> bool:
    """Return whether a site is tested: `final_norm` repeats the last layer, and parts would be further tests."""
    return site in (ENCODER, ADAPTER) or is_layer(site)


def pair_sites(first: ProbeRun, second: ProbeRun) -> list[tuple[str, str]]:
    """Return the sites of both runs that are compared: of one name, and of layers those of equal relative depth.

    A layer is compared with that layer of the other model whose depth is nearest, if it was probed.
    """
    others = [site for site in second.sites if is_layer(site)]
    pairs = []
    for site in first.sites:
        if not is_layer(site):
            if site in second.sites:
                pairs.append((site, site))
        elif others:
            depth = layer_number(site) / layer_number(first.last_layer)
            wanted = depth * layer_number(second.last_layer)  # among the other model's layers
            nearest = min(others, key=lambda other: abs(layer_number(other) - wanted))
            if abs(layer_number(nearest) - wanted) <= 0.5:
                pairs.append((site, nearest))
    return pairs


def _test_sites(
    first: ProbeRun, second: ProbeRun, pairs: Sequence[tuple[str, str]], swaps: Tensor
) -> dict[tuple[str, str], float]:
    """Return the corrected p-value of each pair of sites, from runs that exchange some images, f[1 + P, N]."""
    if not pairs:
        return {}
    task = first.task
    differences = []
    for site, other in pairs:  # one at a time: the sums of all sites can be large
        of_first = first.sums_at([site])[0].double()  # [N, M]
        of_second = second.sums_at([other])[0].double()
        moved = swaps @ (of_second - of_first)
        swapped_first = task.dataset_scores(of_first.sum(0) + moved)
        swapped_second = task.dataset_scores(of_second.sum(0) - moved)
        differences.append(swapped_second[task.score] - swapped_first[task.score])
    _, corrected = p_values(torch.stack(differences, 1))
    return dict(zip(pairs, corrected.tolist(), strict=True))


def compare_classes(
    first: ProbeRun, second: ProbeRun, sites: tuple[str, str], swaps: Tensor
) -> Iterator[Entry]:
    """Yield a row for each class that is labelled or predicted, at one site of each run.

    Classes are tested together: of equal models, one pair in 20 has a class with a p-value below 0.05, also where
    classes are in a handful of photos, of which bootstrap intervals cover too little. A class in fewer than
    `FEWEST_PHOTOS` photos, or groups of these, has no p-value.
    """
    iou = first.task.iou
    sums = []
    for run, site in zip((first, second), sites, strict=True):
        sums.append(run.sums_at([site])[0].double())
    of_first, of_second = sums
    moved = swaps @ (of_second - of_first)
    swapped_second = iou(of_second.sum(0) - moved)
    swapped = swapped_second - iou(of_first.sum(0) + moved)  # [1 + P, K]
    is_defined = ~swapped[0].isnan()
    classes = is_defined.nonzero().flatten().tolist()
    if not classes:
        return
    _, corrected = p_values(swapped[:, classes].nan_to_num())
    everything = torch.ones_like(first.weights[:1])
    weights = torch.cat([everything, first.weights]).double()
    drawn = [iou(weights @ of_run).nan_to_num() for of_run in sums]
    photos = first.units_by_class
    for k, p in zip(classes, corrected.tolist(), strict=True):
        scores = [Estimate.from_vector(of_run[:, k]) for of_run in drawn]
        name = first.metrics["classes"][k]
        row = _row("class", name, first.task, *scores, *sites)
        if photos[k] < FEWEST_PHOTOS:
            p = None
        of_first, of_second = scores
        row |= tested_columns(first.task, of_second - of_first, p=p, counts=[photos[k]] * 2)
        yield row | {"photos": photos[k]}


def tested_columns(
    task: Task, difference: Estimate, *, p: float | None, counts: Sequence[float]
) -> Entry:
    """Return the columns of a row of a site or class about its test, from counts of images or groups of these."""
    finding = find_difference(
        task,
        value=difference.value,
        ci95=difference.ci95,
        ci90=difference.widened(counts),
        p=p,
        units=counts[0],
    )
    return {"p": p, "finding": finding, "detectable": detectable(difference.ci95, task.margin)}


def _row(
    of: str,
    name: str,
    task: Task,
    first: Estimate,
    second: Estimate,
    site: str | None = None,
    second_site: str | None = None,
) -> Entry:
    """Return the row of a difference of two numbers, without its p-value."""
    difference = second - first
    measured = difference.json(lowest=-task.highest, highest=task.highest)
    low, high = measured["ci95"]
    return {
        "of": of,
        "name": name,
        "site": site,
        "second_site": second_site,
        "first_value": first.value,
        "second_value": second.value,
        "difference": difference.value,
        "low": low,
        "high": high,
    }
