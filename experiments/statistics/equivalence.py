"""How often the report says that nothing is there (probes/report/verdicts.py): two one-sided tests at 5%.

    python -m experiments.statistics.equivalence --studies 500

Populations are those of `model_pairs.py`. Three numbers of a study are judged: the difference of two models at a site,
that of their best layers, and what a model has beyond random and permuted ones, three draws each. The margin is about
three times the half width of the 90% interval. A line for each population, number of photos and number: how often it is
said to be less than the margin where it is the margin, and where it is 0. Beyond random this is *not learned*, else *no
effect* or *negligible*.

Shapes: S sites, N images, M sums per image.
"""

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.best_layers import difference_of_best
from probes.report.verdicts import UNDECIDED, compare_to_draws, equivalence, judge_draws, worst_of
from probes.score.estimate import Estimate, dataset_scores, resampled_scores

from .model_pairs import CLASSES_TASK, FLAT, PEAKED, POPULATION, RESAMPLINGS, Sample, population

SCENES = {
    "all classes, layers differ": PEAKED,
    "three of 20, layers differ": PEAKED,
    "three of 20, layers alike": FLAT,
}
PHOTOS = (24, 60, 200)
RATIO = 3  # margin in half widths of the 90% interval
PILOT = 40  # studies that the half width is estimated from
FIRST_GAP = 0.05  # of accuracies, from which that of the margin follows
KINDS = 2  # of random weights
DRAWS = 3  # of each in a study
RANDOM_MODELS = 8  # of each kind, that the draws are among
SPREAD = 0.006  # of their accuracies
FIRST_SEED = 100  # of their populations

Models = Sequence[torch.Tensor]  # f[S, N, M] of each
Judge = Callable[[Models, np.ndarray, np.random.Generator], Sequence[float]]


def scores_of(model: torch.Tensor, images: np.ndarray) -> list[Estimate]:
    """Return mIoU by site of a model on some images."""
    sums = model[:, images]
    values = dataset_scores(CLASSES_TASK, sums)["miou"].tolist()
    weights = bootstrap_weights(len(images), RESAMPLINGS)
    drawn = resampled_scores(CLASSES_TASK, sums, weights)["miou"]
    return [Estimate(value, of_site) for value, of_site in zip(values, drawn.T, strict=True)]


def counts_of(model: torch.Tensor, images: np.ndarray) -> tuple[float, float]:
    """Return how many images there are, and how many of a class on average."""
    sample = Sample(model[:1], images, classes=model.shape[-1] // 3, sites=["a site"])
    return sample.units, sample.units_of_class


def at_site(models: Models, images: np.ndarray, _: np.random.Generator) -> Sequence[float]:
    """Return the 90% interval of the difference of two models at their first site."""
    first, second = (scores_of(model[:1], images)[0] for model in models)
    return (second - first).widened(counts_of(models[0], images))


def at_best_layers(models: Models, images: np.ndarray, _: np.random.Generator) -> Sequence[float]:
    """Return the 90% interval of the difference of the best layers of two models."""
    first, second = (scores_of(model, images) for model in models)
    difference = difference_of_best(1, first, second, counts=counts_of(models[0], images))
    return difference.equivalence_interval


def beyond_random(models: Models, images: np.ndarray, rng: np.random.Generator) -> Sequence[float]:
    """Return the 90% interval of what a model, the last one, has beyond draws of the random ones before it."""
    *random, trained = models
    of_trained = scores_of(trained[:1], images)[0]
    compared = []
    for kind in np.split(np.arange(len(random)), KINDS):
        drawn = [scores_of(random[i], images)[0] for i in rng.choice(kind, DRAWS)]
        compared.append(compare_to_draws(of_trained, drawn))
    columns = []
    for estimate in compared:
        others = [other for other in compared if other is not estimate]
        columns.append(judge_draws(1, estimate, others, counts=counts_of(trained, images)))
    return worst_of(1, columns)["ci90"]


JUDGES: dict[str, Judge] = {
    "a site": at_site,
    "best layers": at_best_layers,
    "beyond random": beyond_random,
}


def random_models(scene: str, accuracy: float) -> list[torch.Tensor]:
    """Return models at one site, those of a kind after the other; kinds have the same accuracies."""
    offsets = np.random.default_rng(0).normal(0, SPREAD, RANDOM_MODELS)
    offsets -= offsets.mean()
    models = []
    for i, offset in enumerate(np.tile(offsets, KINDS)):
        models.append(population(scene, [accuracy + offset], FIRST_SEED + i))
    return models


def truth_of(models: Models, judge: Judge) -> float:
    """Return the number that is judged, in the populations; beyond random, that beyond the nearer kind."""
    sites = slice(None)
    if judge is at_site:
        sites = slice(1)
    scores = [dataset_scores(CLASSES_TASK, model[sites])["miou"].max().item() for model in models]
    *others, last = scores
    kinds = [others]
    if judge is beyond_random:
        kinds = np.split(np.array(others), KINDS)
    return last - max(map(np.mean, kinds))


def half_width(models: Models, judge: Judge, photos: int, rng: np.random.Generator) -> float:
    """Return the mean half width of the 90% interval."""
    widths = []
    for _ in range(PILOT):
        images = rng.choice(POPULATION, photos, replace=False)
        low, high = judge(models, images, rng)
        widths.append(high - low)
    return float(np.mean(widths)) / 2


def said(
    models: Models,
    judge: Judge,
    margin: float,
    *,
    photos: int,
    studies: int,
    rng: np.random.Generator,
) -> int:
    """Return in how many studies less than the margin is said to be there."""
    count = 0
    for _ in range(studies):
        images = rng.choice(POPULATION, photos, replace=False)
        ci90 = judge(models, images, rng)
        if judge is beyond_random:
            count += ci90[1] < margin
        else:
            count += equivalence(ci90, margin) != UNDECIDED
    return count


def measure(scene: str, name: str, photos: int, studies: int) -> str:
    """Return a line of the table."""
    rng = np.random.default_rng(photos)
    judge, quality = JUDGES[name], SCENES[scene]
    others = [population(scene, quality, 1)]
    if judge is beyond_random:
        quality = quality[2:3]
        others = random_models(scene, quality[0])

    def with_gap(gap: float) -> list[torch.Tensor]:
        return [*others, population(scene, [accuracy + gap for accuracy in quality], 2)]

    equal = with_gap(0.0)
    apart = with_gap(FIRST_GAP)
    wanted = RATIO * half_width(equal, judge, photos, rng)
    gain = truth_of(apart, judge) - truth_of(equal, judge)
    apart = with_gap(FIRST_GAP * wanted / gain)
    options = {"photos": photos, "studies": studies, "rng": rng}
    margin = truth_of(apart, judge)
    at_margin = said(apart, judge, margin, **options)
    at_zero = said(equal, judge, wanted, **options)
    return f"{scene}; {name}; {photos} photos; margin {100 * margin:.1f}; {at_margin}, {at_zero}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--photos", type=int, nargs="*", default=PHOTOS)
    parser.add_argument("--scenes", nargs="*", default=[*SCENES], choices=SCENES)
    args = parser.parse_args()
    for scene in args.scenes:
        for photos in args.photos:
            for name in JUDGES:
                print(measure(scene, name, photos, args.studies), flush=True)


if __name__ == "__main__":
    main()
