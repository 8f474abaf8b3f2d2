"""Coverage of bootstrap intervals of mIoU with rare classes, for the rules that could be used.

    python -m experiments.statistics.intervals                     # simulated populations of images
    python -m experiments.statistics.intervals RUN --sites encoder adapter    # resampled from a finished run's counts

Prints, for studies of so many images: how often the 95% interval of the mIoU of a site, and that of the difference of
two sites, covers the value of the population over the classes that the study's images have; how often that of the site
covers the value over all classes; how often an interval leaves out its own score; and its length in points.

    basic       resampled values reflected about the score, as the basic bootstrap
    percentile  quantiles of the resampled values
    bca         percentile, corrected for bias and acceleration (jackknife), where both are defined
    symmetric   score +- 95% quantile of the distance of resampled values from their mean
    normal      score +- 1.96 standard deviations of the resampled values
    smooth      as symmetric, with weights of the Bayesian bootstrap, under which no class drops out

In a population, class k of K is in a share of the images that falls from 90% to that of the rarest class, and covers a
random part of each. A part of its pixels, by class and image, is predicted as another class of the image, or as any.
"""

import argparse
from typing import NamedTuple

import numpy as np
import scipy.stats

POPULATION = 20_000
RESAMPLINGS = 1000
RULES = ("basic", "percentile", "bca", "symmetric", "normal", "smooth")
Z = 1.959964


def simulate_population(classes: int, rarest: float, seed: int) -> np.ndarray:
    """Return intersection, predicted and labelled of two sites, f[2, 3, POPULATION, K]."""
    rng = np.random.default_rng(seed)
    presence = np.geomspace(0.9, rarest, classes)
    present = rng.random((POPULATION, classes)) < presence
    present[np.arange(POPULATION), rng.integers(0, 3, POPULATION)] = True
    area = present * rng.lognormal(0, 1, (POPULATION, classes))
    labelled = area / area.sum(1, keepdims=True)
    ease = rng.normal(0, 0.6, (POPULATION, 1))
    quality = rng.normal(0.8, 0.7, classes)
    sites = []
    for shift in (0.0, -0.15):
        noise = rng.normal(0, 0.4, (POPULATION, classes))
        logits = quality + ease + shift + noise
        right = 1 / (1 + np.exp(-logits))
        wrong = labelled * (1 - right)
        anywhere = rng.dirichlet(np.ones(classes), POPULATION)
        towards = 0.9 * present + 0.1 * anywhere * classes
        towards /= towards.sum(1, keepdims=True)
        stray = rng.random((POPULATION, classes)) < 0.03  # a class is predicted where it is not
        towards = towards * (present | stray)
        towards /= towards.sum(1, keepdims=True)
        intersection = labelled * right
        predicted = intersection + wrong.sum(1, keepdims=True) * towards
        sites.append([intersection, predicted, labelled])
    return np.array(sites)


def read_population(run: str, sites: list[str]) -> np.ndarray:
    """Return the counts of two sites of a finished run, f[2, 3, N, K]."""
    from probes.runs.read import ProbeRun

    probed = ProbeRun(run)
    counts = probed.counts
    population = []
    for site in sites:
        i = probed.sites.index(site)
        fields = (counts.intersection[i], counts.predicted[i], counts.labelled)
        population.append([field.double().numpy() for field in fields])
    return np.array(population)


def class_ious(counts: np.ndarray) -> np.ndarray:
    """Return the IoU f[..., K] of counts [..., 3, K], NaN for a class that is neither labelled nor predicted."""
    intersection, predicted, labelled = np.moveaxis(counts, -2, 0)
    union = predicted + labelled - intersection
    return np.divide(intersection, union, out=np.full_like(union, np.nan), where=union > 0)


def miou(counts: np.ndarray) -> np.ndarray:
    """Return the mIoU f[...] of counts [..., 3, K], over classes that are labelled or predicted."""
    return np.nanmean(class_ious(counts), -1)


def resample(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mIoU f[R, 2] of both sites for weights f[R, N]."""
    resampled = np.einsum("rn,scnk->rsck", weights, counts, optimize=True)
    return miou(resampled)


class Scores(NamedTuple):
    """Values of a score in a study.

    Args:
        score: Of its images.
        drawn: f[R], under resampling of images.
        smooth: f[R], under weights of the Bayesian bootstrap.
        left_out: f[N], without one image.
    """

    score: float
    drawn: np.ndarray
    smooth: np.ndarray
    left_out: np.ndarray

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Return the interval of each rule."""
        score = self.score
        low, high = np.quantile(self.drawn, [0.025, 0.975])
        half = half_width(self.drawn)
        half_normal = Z * self.drawn.std()
        half_smooth = half_width(self.smooth)
        return {
            "basic": (2 * score - high, 2 * score - low),
            "percentile": (low, high),
            "bca": bca_interval(score, self.drawn, self.left_out),
            "symmetric": (score - half, score + half),
            "normal": (score - half_normal, score + half_normal),
            "smooth": (score - half_smooth, score + half_smooth),
        }


def half_width(drawn: np.ndarray) -> float:
    """Return the 95% quantile of the distance of values f[R] from their mean."""
    return np.quantile(np.abs(drawn - drawn.mean()), 0.95)


def bca_interval(score: float, drawn: np.ndarray, left_out: np.ndarray) -> tuple[float, float]:
    """Return the bias-corrected and accelerated interval (Efron 1987)."""
    least = 1 / len(drawn)
    below = np.clip((drawn < score).mean(), least, 1 - least)
    bias = scipy.stats.norm.ppf(below)
    slope = left_out.mean() - left_out
    spread = (slope**2).sum() ** 1.5
    acceleration = 0.0
    if spread:
        acceleration = (slope**3).sum() / (6 * spread)
    levels = []
    for z in (-Z, Z):
        shifted = bias + z
        corrected = bias + shifted / (1 - acceleration * shifted)
        levels.append(scipy.stats.norm.cdf(corrected))
    low, high = np.quantile(drawn, levels)
    return low, high


def cover(population: np.ndarray, images: int, studies: int, seed: int) -> dict[str, np.ndarray]:
    """Return per rule: coverage (site, difference, site over all classes), shares without the own score, lengths."""
    rng = np.random.default_rng(seed)
    true = class_ious(population.sum(2))
    by_rule: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
    for _ in range(studies):
        counts = population[:, :, rng.integers(0, population.shape[2], images)]
        site, difference = study_scores(rng, counts)
        site_intervals = site.intervals()
        difference_intervals = difference.intervals()
        is_shown = counts[0, 2].sum(0) > 0
        first, second = true[:, is_shown].mean(1)
        for rule in RULES:
            low, high = site_intervals[rule]
            low_difference, high_difference = difference_intervals[rule]
            by_rule[rule].append(
                [
                    low <= first <= high,
                    low_difference <= first - second <= high_difference,
                    low <= true[0].mean() <= high,
                    not low <= site.score <= high,
                    not low_difference <= difference.score <= high_difference,
                    100 * (high - low),
                    100 * (high_difference - low_difference),
                ]
            )
    return {rule: np.mean(rows, 0) for rule, rows in by_rule.items()}


def study_scores(rng: np.random.Generator, counts: np.ndarray) -> tuple[Scores, Scores]:
    """Return the mIoU of the first site, and its difference from the second, of counts f[2, 3, N, K]."""
    images = counts.shape[2]
    weights = rng.multinomial(images, np.full(images, 1 / images), RESAMPLINGS).astype(float)
    smooth = rng.dirichlet(np.ones(images), RESAMPLINGS) * images
    both = [
        miou(counts.sum(2))[None],
        resample(counts, weights),
        resample(counts, smooth),
        resample(counts, 1 - np.eye(images)),
    ]
    (score,), *others = [sites[:, 0] for sites in both]
    (difference,), *other_differences = [sites[:, 0] - sites[:, 1] for sites in both]
    return Scores(score, *others), Scores(difference, *other_differences)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", nargs="?", help="a finished run, whose validation images are the population"
    )
    parser.add_argument("--sites", nargs=2, default=["encoder", "adapter"])
    parser.add_argument("--studies", type=int, default=300)
    parser.add_argument("--images", type=int, nargs="+", default=[24, 60, 200])
    args = parser.parse_args()
    if args.run:
        populations = {args.run: read_population(args.run, args.sites)}
    else:
        cases = {
            "6 classes, rarest in 10%": (6, 0.1),
            "23, 2%": (23, 0.02),
            "60, 0.5%": (60, 0.005),
        }
        populations = {name: simulate_population(*case, seed=0) for name, case in cases.items()}
    print(
        "population, images, rule: covers (site, difference, all classes); without its score (both); length (both)"
    )
    for name, population in populations.items():
        for images in args.images:
            for rule, row in cover(population, images, args.studies, seed=1).items():
                *shares, length, length_of_difference = row
                listed = ", ".join(f"{100 * share:5.1f}%" for share in shares)
                lengths = f"{length:5.1f} {length_of_difference:5.1f}"
                print(f"{name:<26} {images:4d} {rule:<11} {listed}   {lengths}", flush=True)


if __name__ == "__main__":
    main()
