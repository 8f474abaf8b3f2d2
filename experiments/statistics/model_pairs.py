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
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/helpers"))

from probe_runs import CLASSES_TASK, random_counts, sums_of

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.compare import compare_runs
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

    def __init__(self, population: torch.Tensor, images: np.ndarray, classes: int):
        sums = population[:, images]
        scores = dataset_scores(CLASSES_TASK, sums)["miou"]
        super().__init__(
            sums=sums,
            sites=SITES,
            last_layer=SITES[-1],
            peak_layer=SITES[scores.argmax()],
            task=CLASSES_TASK,
            groups=None,
            is_solved=False,
            effects={},
            weights=bootstrap_weights(len(images), RESAMPLINGS),
            metrics={"images": len(images), "classes": [f"class {k}" for k in range(classes)]},
        )

    def sums_at(self, sites: list[str]) -> torch.Tensor:
        """Return the sums per image at some sites, f[S, N, M]."""
        return self.sums[[SITES.index(site) for site in sites]]

    @property
    def site_scores(self) -> dict[str, Estimate]:
        """Return mIoU by site."""
        values = dataset_scores(self.task, self.sums)["miou"].tolist()
        drawn = resampled_scores(self.task, self.sums, self.weights)["miou"]
        return {site: Estimate(values[i], drawn[:, i]) for i, site in enumerate(self.sites)}

    def chosen_score(self, layers: torch.Tensor) -> Estimate:
        """Return mIoU with each image read at its layer i64[N]."""
        read = self.sums[layers, torch.arange(self.sums.shape[1])][None]
        value = dataset_scores(self.task, read)["miou"].item()
        return Estimate(value, resampled_scores(self.task, read, self.weights)["miou"][:, 0])


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
    own = np.random.default_rng(seed)
    sums = []
    for q in quality:
        logit = np.log(q / (1 - q)) + ease + own.normal(0, 0.3, present.shape)
        right = (labelled / (1 + np.exp(-logit))).round()
        predicted = right + (labelled - right) @ towards
        sums.append(np.concatenate([right, predicted, labelled], 1))
    return torch.tensor(np.stack(sums))


def population(scene: str, quality: list[float], seed: int) -> torch.Tensor:
    """Return the sums f[S, N, M] of all images of a scene for one model."""
    if scene.startswith("all classes"):
        return sums_of(
            random_counts(quality, images=POPULATION, classes=CLASSES["all classes"], seed=seed)
        )
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


def difference(samples: list[Sample], score: Callable[[Sample], Estimate]) -> dict[str, Any]:
    """Return the difference of two samples by a score, as an entry of a report has it."""
    found = score(samples[1]) - score(samples[0])
    return {"difference": found.value, "ci95": found.ci95}


METHODS = {  # beside that of the report
    "cross-validated": lambda samples: difference(samples, cross_validated),
    "best here": lambda samples: difference(samples, best_here),
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
        classes = CLASSES[scene.partition(",")[0]]
        populations = [population(scene, q, seed) for seed, q in enumerate(qualities, 1)]
        best = [dataset_scores(CLASSES_TASK, x)["miou"].max().item() for x in populations]
        truth = best[1] - best[0]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in ("report", *METHODS)}
        named = []
        for _ in range(args.pairs):
            images = rng.choice(POPULATION, args.images, replace=False)
            samples = [Sample(x, images, classes) for x in populations]
            rows = list(compare_runs(*samples))
            found["report"] += [
                {"ci95": [row["low"], row["high"]]} for row in rows if row["of"] == "best layer"
            ]
            classes = [row for row in rows if row["of"] == "class" and row["p"]]
            named.append(sum(x["p"] < 0.05 and abs(x["difference"]) >= 0.01 for x in classes))
            for name, method in METHODS.items():
                found[name].append(method(samples))
        print(f"{scene}; {100 * truth:+.2f}", end="")
        for name, entries in found.items():
            low, high = np.transpose([x["ci95"] for x in entries])
            covered = ((low <= truth) & (truth <= high)).sum()
            said = (low * high > 0).sum()
            width = 50 * (high - low).mean()
            print(f"; {name}: {covered}, {said}, {width:.2f}", end="")
        print(f"; classes: {sum(x > 0 for x in named)}, {sum(named) / len(named):.1f}", flush=True)


if __name__ == "__main__":
    main()
