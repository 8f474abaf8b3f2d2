"""Compare runs on the same images, the second minus the first: sites, best layers, effects and classes in one table.

Two masks of a model and two models are compared alike. Intervals (95%) are of differences over the same resamplings of
the images; that of the best layers holds whichever layers are best. p-values come from exchanging the two runs image by
image, corrected for the number of sites or of classes (max-T). Layers of models of other depth are compared at equal
relative depth. One training each: what another one would change is in no interval.

Shapes: S sites, N images, K classes, R resamplings, P permutations.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llava_bidir.common.bootstrap import RESAMPLINGS, p_values, random_swaps, simultaneous_band
from llava_bidir.common.errors import UserError
from probes.models.sites import ADAPTER, ENCODER, is_layer, layer_number
from probes.runs.compare import check_same_probes
from probes.runs.formatting import Entry
from probes.runs.read import ProbeRun
from probes.runs.study import StudyRuns, runs_to_compare
from probes.score.effects import EFFECTS
from probes.score.estimate import Estimate
from probes.tasks import SEGMENTATION, Task

BEST_LAYER = "best layer"
LEFT_OUT = "left out"
FEWEST_PHOTOS = 6  # exchanging fewer can reject nothing: 2 ** (1 - 5) > 0.05


def difference_rows(studies: Sequence[StudyRuns], keys: dict[str, str]) -> Iterator[Entry]:
    """Yield the rows of the table of differences, see :class:`probes.report.tables.Tables`.

    Each model is compared with the first one of its task, data and seed, under each mask that both have; and of each
    model bidirectional with causal attention.

    Args:
        studies: In the order given.
        keys: Keys of models by name.
    """
    references: dict[tuple, StudyRuns] = {}
    for study in studies:
        about = {"task": study.task.name, "data": study.dataset, "seed": study.seed}
        first = references.setdefault(tuple(about.values()), study)
        if first.name != study.name:
            ours, theirs = runs_to_compare(first, study)
            models = about | {
                "between": "models",
                "first": keys[first.name],
                "second": keys[study.name],
            }
            for mask in [mask for mask in ours if mask in theirs]:
                of_mask = models | {"mask": mask}
                try:
                    check_same_probes(ours[mask], theirs[mask])
                except UserError as error:
                    yield of_mask | {"of": LEFT_OUT, "name": str(error)}
                    continue
                rows = compare_runs(ours[mask], theirs[mask])
                yield from (of_mask | row for row in rows)
        if pair := study.pair():
            masks = about | {
                "between": "masks",
                "model": keys[study.name],
                "first": pair[0].mask,
                "second": pair[1].mask,
            }
            yield from (masks | row for row in compare_runs(*pair))


def compare_runs(
    first: ProbeRun, second: ProbeRun, permutations: int = RESAMPLINGS
) -> Iterator[Entry]:
    """Yield a row for each difference; "of" is "site", "effect", "best layer" or "class"."""
    task = first.task
    ours = first.site_scores
    theirs = second.site_scores
    swaps = random_swaps(first.metrics["images"], permutations, groups=first.groups).double()
    pairs = pair_sites(first, second)
    tested = [pair for pair in pairs if has_depth(pair[0])]
    p_of = _test_sites(first, second=second, pairs=tested, swaps=swaps)
    for pair in pairs:
        row = _row("site", pair[0], task, ours[pair[0]], theirs[pair[1]], *pair)
        yield row | {"p": p_of.get(pair)}
    for name in EFFECTS:
        if name in first.effects and name in second.effects:
            yield _row(
                "effect",
                name=name,
                task=task,
                first=first.effects[name],
                second=second.effects[name],
            )
    best = (first.peak_layer, second.peak_layer)
    if all(best):
        layers = [[x for site, x in of.items() if is_layer(site)] for of in (ours, theirs)]
        about = {"of": BEST_LAYER, "name": BEST_LAYER, "site": best[0], "second_site": best[1]}
        yield about | difference_of_best(task.sign, *layers)
        if task.name == SEGMENTATION:
            yield from compare_classes(first, second=second, sites=best, swaps=swaps)


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
            pairs += [(site, site)] if site in second.sites else []
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
        a = first.sums_at([site])[0].double()  # [N, M]
        b = second.sums_at([other])[0].double()
        moved = swaps @ (b - a)
        scores = [task.dataset_scores(x)[task.score] for x in (a.sum(0) + moved, b.sum(0) - moved)]
        differences.append(scores[1] - scores[0])
    corrected = p_values(torch.stack(differences, 1))[1].tolist()
    return dict(zip(pairs, corrected, strict=True))


def difference_of_best(
    sign: int, first: Sequence[Estimate], second: Sequence[Estimate]
) -> dict[str, float]:
    """Return the difference of the best of the second scores and the best of the first, with a 95% interval.

    The interval holds whichever are best: with bounds on all differences D of one score and another together, the
    difference of maxima, max min D, is between the max min of the lower bounds and that of the upper ones. An interval
    of the two that are best on these images says of equal models up to twice too often that they differ, and one of
    layers that cross-validation has chosen up to six times (`experiments/statistics/model_pairs.py`).

    Args:
        sign: 1 if a higher score is better, else -1.
        first: Scores of one run's layers, from the same resamplings as those of the other's.
        second: Of the other's.
    """
    ours, theirs = (
        sign * torch.stack([score.vector for score in scores], 1) for scores in (first, second)
    )
    differences = theirs[:, :, None] - ours[:, None, :]  # [1 + R, layers, layers]
    bands = simultaneous_band(differences[0].flatten(), differences[1:].flatten(1))
    bounds = [sign * band.view_as(differences[0]).amin(1).amax().item() for band in bands]
    best = [sign * of[0].max().item() for of in (ours, theirs)]
    return {
        "first_value": best[0],
        "second_value": best[1],
        "difference": best[1] - best[0],
        "low": min(bounds),
        "high": max(bounds),
    }


def compare_classes(
    first: ProbeRun, second: ProbeRun, sites: tuple[str, str], swaps: Tensor
) -> Iterator[Entry]:
    """Yield a row for each class that is labelled or predicted, at one site of each run.

    Classes are tested together: of equal models, one pair in 20 has a class with a p-value below 0.05, also where
    classes are in a handful of photos, of which bootstrap intervals cover too little. A class in fewer than
    `FEWEST_PHOTOS` photos, or groups of these, has no p-value.
    """
    a, b = (
        run.sums_at([site])[0].double() for run, site in zip((first, second), sites, strict=True)
    )
    moved = swaps @ (b - a)
    iou = first.task.iou
    swapped = iou(b.sum(0) - moved) - iou(a.sum(0) + moved)  # [1 + P, K]
    known = (~swapped[0].isnan()).nonzero().flatten().tolist()
    if not known:
        return
    corrected = p_values(swapped[:, known].nan_to_num())[1].tolist()
    weights = torch.cat([torch.ones(1, len(a)), first.weights]).double()
    drawn = [iou(weights @ sums).nan_to_num() for sums in (a, b)]
    photos = photos_of_classes(first)
    for k, p in zip(known, corrected, strict=True):
        row = _row(
            "class",
            first.metrics["classes"][k],
            first.task,
            *(Estimate.from_vector(x[:, k]) for x in drawn),
            *sites,
        )
        yield row | {"photos": photos[k], "p": p if photos[k] >= FEWEST_PHOTOS else None}


def photos_of_classes(run: ProbeRun) -> list[int]:
    """Return in how many validation images each class is labelled; of images in groups, in how many groups."""
    labelled = run.sums_at(run.sites[:1])[0].unflatten(-1, (3, -1))[:, 2] > 0  # [N, K]
    if run.groups is not None:
        labelled = torch.stack([labelled[run.groups == x].any(0) for x in run.groups.unique()])
    return labelled.sum(0).tolist()


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
    low, high = difference.json(lowest=-task.highest, highest=task.highest)["ci95"]
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
