"""Coverage and power of the comparison of two models on the same photos (probes/report/compare.py).

    python -m experiments.statistics.model_pairs --pairs 200 --images 100

Populations of images have known differences of best layers. "all classes": each of eight classes is in each image, and
one model is 2.6 points less accurate at every layer. "three of 20": each image has three classes, and the layers of a
model differ by up to 12 points ("peaked") or not at all ("flat"). Pairs of studies are drawn from them. A line for
each: the true difference of best layers in points, how often its 95% interval covers it, how often the report says that
the models differ, and the mean half width. The same follows for layers that are chosen by cross-validation, each
model's on other images than it is scored on, and for those that are best on the images themselves. Last, how often the
report names a class in which they differ, and how many classes it names on average.

Shapes: S sites, N images, M sums per image.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/helpers"))

from probe_runs import CLASSES_TASK, random_counts, sums_of

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.compare import compare_runs
from probes.runs.read import ProbeRun
from probes.score.effects import cross_validated_layers, image_folds
from probes.score.estimate import Estimate, dataset_scores, resampled_scores

POPULATION = 20_000
CLASSES = {"all classes": 8, "three of 20": 20}
RESAMPLINGS = 1000
SITES = ["layer_01", "layer_02", "layer_03", "layer_04", "layer_05"]
PEAKED = [0.50, 0.55, 0.62, 0.58, 0.55]
FLAT = [0.58] * 5
# by scene: the pixel accuracies of both models
SCENES = {
    "all classes, equal": (PEAKED, PEAKED),
    "all classes, apart": (PEAKED, [q - 0.026 for q in PEAKED]),
    "three of 20, equal and peaked": (PEAKED, PEAKED),
    "three of 20, equal and flat": (FLAT, FLAT),
    "three of 20, peaked and flat": (PEAKED, FLAT),
    "three of 20, apart": (PEAKED, [q - 0.04 for q in PEAKED]),
}


class Sample(SimpleNamespace):
    """What `compare_runs` reads of a run: some images of a population f[S, N, M]."""

    units_by_class = ProbeRun.units_by_class
    units_of_class = ProbeRun.units_of_class

    def __init__(
        self,
        population: torch.Tensor,
        images: np.ndarray,
        classes: int,
        sites: Sequence[str] = SITES,
    ):
        sums = population[:, images]
        scores = dataset_scores(CLASSES_TASK, sums)["miou"]
        super().__init__(
            sums=sums,
            sites=sites,
            units=len(images),
            last_layer=sites[-1],
            peak_layer=sites[scores.argmax()],
            task=CLASSES_TASK,
            task_name=CLASSES_TASK.name,
            groups=None,
            is_solved=False,
            effects={},
            weights=bootstrap_weights(len(images), RESAMPLINGS),
            metrics={"images": len(images), "classes": [f"class {k}" for k in range(classes)]},
        )

    def sums_at(self, sites: list[str]) -> torch.Tensor:
        """Return the sums per image at some sites, f[S, N, M]."""
        return self.sums[[self.sites.index(site) for site in sites]]

    @property
    def site_scores(self) -> dict[str, Estimate]:
        """Return mIoU by site."""
        values = dataset_scores(self.task, self.sums)["miou"].tolist()
        drawn = resampled_scores(self.task, self.sums, self.weights)["miou"]
        estimates = {}
        for site, value, drawn_at_site in zip(self.sites, values, drawn.T, strict=True):
            estimates[site] = Estimate(value, drawn_at_site)
        return estimates

    def chosen_score(self, layers: torch.Tensor) -> Estimate:
        """Return mIoU with each image read at its layer i64[N]."""
        images = torch.arange(self.sums.shape[1])
        at_layers = self.sums[layers, images][None]
        value = dataset_scores(self.task, at_layers)["miou"].item()
        drawn = resampled_scores(self.task, at_layers, self.weights)["miou"]
        return Estimate(value, drawn[:, 0])


def rare_classes(quality: list[float], seed: int) -> torch.Tensor:
    """Return the sums f[S, N, M] of images with three classes each, of which some are rare."""
    classes = CLASSES["three of 20"]
    same = np.random.default_rng(7)  # images are the same for all models
    frequency = 1 / (1 + np.arange(classes) / 4)
    order = np.log(frequency) + same.gumbel(size=(POPULATION, classes))  # draws without replacement
    present = order >= np.sort(order, 1)[:, -3:-2]
    size = same.lognormal(0, 0.7, present.shape) * present
    labelled = (1000 * size / size.sum(1, keepdims=True)).round()
    ease = same.normal(0, 1, present.shape) + same.normal(0, 0.7, classes)
    towards = same.random((classes, classes)) ** 2
    np.fill_diagonal(towards, 0)
    towards /= towards.sum(1, keepdims=True)
    rng_of_model = np.random.default_rng(seed)
    sums = []
    for accuracy in quality:
        noise = rng_of_model.normal(0, 0.3, present.shape)
        logit = np.log(accuracy / (1 - accuracy)) + ease + noise
        right = (labelled / (1 + np.exp(-logit))).round()
        predicted = right + (labelled - right) @ towards
        sums.append(np.concatenate([right, predicted, labelled], 1))
    return torch.tensor(np.stack(sums))


def population(scene: str, quality: list[float], seed: int) -> torch.Tensor:
    """Return the sums f[S, N, M] of all images of a scene for one model."""
    if scene.startswith("all classes"):
        classes = CLASSES["all classes"]
        counts = random_counts(quality, images=POPULATION, classes=classes, seed=seed)
        return sums_of(counts)
    return rare_classes(quality, seed)


def cross_validated(sample: Sample) -> Estimate:
    """Return the score with each image read at the layer that is best on other ones, kept in all resamplings."""
    images = sample.sums.shape[1]
    fold = image_folds(images, None)
    everything = torch.ones(1, images).double()
    (layers,) = cross_validated_layers(
        CLASSES_TASK, sums=sample.sums.double(), fold=fold, weights=everything
    )
    return sample.chosen_score(layers[fold])


def best_here(sample: Sample) -> Estimate:
    """Return the score of the layer that is best on the images of the sample."""
    return sample.site_scores[sample.peak_layer]


METHODS: dict[str, Callable[[Sample], Estimate]] = {  # beside that of the report
    "cross-validated": cross_validated,
    "best here": best_here,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=200, help="studies of two models")
    parser.add_argument("--images", type=int, default=100, help="validation images of a study")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("scene; true difference; by method: covered, said to differ, half width; classes named")
    for scene, qualities in SCENES.items():
        kind, _, _ = scene.partition(",")
        populations = [
            population(scene, quality, seed) for seed, quality in enumerate(qualities, start=1)
        ]
        first, second = [
            dataset_scores(CLASSES_TASK, everything)["miou"].max().item()
            for everything in populations
        ]
        truth = second - first
        intervals: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ("report", *METHODS)
        }
        classes_named = []
        for _ in range(args.pairs):
            images = rng.choice(POPULATION, args.images, replace=False)
            samples = [Sample(everything, images, CLASSES[kind]) for everything in populations]
            rows = list(compare_runs(*samples))
            for row in rows:
                if row["of"] == "best layer":
                    intervals["report"].append((row["low"], row["high"]))
            classes_named.append(sum(map(names_class, rows)))
            for name, score in METHODS.items():
                difference = score(samples[1]) - score(samples[0])
                intervals[name].append(difference.ci95)
        print(f"{scene}; {100 * truth:+.2f}", end="")
        for name, of_method in intervals.items():
            print(f"; {name}: {describe(of_method, truth)}", end="")
        any_named = sum(count > 0 for count in classes_named)
        mean_named = sum(classes_named) / len(classes_named)
        print(f"; classes: {any_named}, {mean_named:.1f}", flush=True)


def names_class(row: dict[str, Any]) -> bool:
    """Return whether a row of a comparison names a class in which the models differ."""
    if row["of"] != "class" or not row["p"]:
        return False
    return row["p"] < 0.05 and abs(row["difference"]) >= 0.01


def describe(intervals: list[tuple[float, float]], truth: float) -> str:
    """Return how often intervals cover the truth, how often they exclude zero, and half their width in points."""
    low, high = np.transpose(intervals)
    covered = ((low <= truth) & (truth <= high)).sum()
    said = (low * high > 0).sum()
    half_width = 50 * (high - low).mean()
    return f"{covered}, {said}, {half_width:.2f}"


if __name__ == "__main__":
    main()
