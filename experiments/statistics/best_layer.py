"""Coverage of claims about the best layer (probes/score/effects.py), on studies whose truth is known.

    python -m experiments.statistics.best_layer --studies 200 --images 100

Populations of images (model_pairs.py) have an adapter and five layers of known accuracy, from which studies
are drawn. A line for each population: the true recovery in points, and by method the mean error of the estimate, how
often its 95% interval covers the truth, how often it is a point or more with an interval above 0, and its half width.

    claims     each image is read at the layer that is best on other images, chosen anew in each resampling
    kept       the same, with the layers of the data set kept in all resamplings
    maximum    the layer that is best on all images, chosen anew in each resampling
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from experiments.statistics.model_pairs import FLAT, PEAKED, POPULATION, RESAMPLINGS, population
from llava_bidir.common.bootstrap import bootstrap_weights
from probes.report.verdicts import MARGIN
from probes.score.effects import EffectSource, cross_validated_layers, image_folds, main_score
from probes.score.estimate import Estimate
from probes.tasks import SEGMENTATION, TASKS

TASK = TASKS[SEGMENTATION]
SITES = ["adapter", "layer_01", "layer_02", "layer_03", "layer_04", "layer_05"]
QUALITIES = {
    "no recovery, flat": [0.58, *FLAT],
    "recovery, flat": [0.55, *FLAT],
    "recovery, peaked": [0.58, *PEAKED],
}


def judged(sums: Tensor, weights: Tensor) -> Estimate:
    """Return recovery as claims read it, from sums f64[S, N, M] and weights f64[R, N]."""
    source = EffectSource(SITES, last_layer=None, task=TASK, weights=weights)
    return source.effects(sums)["recovery"]


def kept(sums: Tensor, weights: Tensor) -> Estimate:
    """Return recovery at the layers that the data set has chosen by cross-validation."""
    adapter = sums[0]
    layers = sums[1:]
    images = sums.shape[1]
    fold = image_folds(images, None)
    everything = torch.ones_like(weights[:1])
    (chosen,) = cross_validated_layers(TASK, sums=layers, fold=fold, weights=everything)
    at_chosen = layers[chosen[fold], torch.arange(images)]
    weights = torch.cat([everything, weights])
    score = main_score(TASK, weights @ at_chosen)
    return Estimate.from_vector(score - main_score(TASK, weights @ adapter))


def maximum(sums: Tensor, weights: Tensor) -> Estimate:
    """Return recovery as the paper has it, with the best layer of each resampling."""
    weights = torch.cat([torch.ones_like(weights[:1]), weights])
    adapter, *layers = [main_score(TASK, weights @ site) for site in sums]
    best = torch.stack(layers).amax(0)
    return Estimate.from_vector(best - adapter)


METHODS: dict[str, Callable[[Tensor, Tensor], Estimate]] = {
    "claims": judged,
    "kept": kept,
    "maximum": maximum,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=200, help="studies of a population")
    parser.add_argument("--images", type=int, default=100, help="validation images of a study")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = bootstrap_weights(args.images, RESAMPLINGS).double()
    print("population; true recovery; by method: error, covered, said to recover, half width")
    for images in ("all classes", "three of 20"):
        for name, quality in QUALITIES.items():
            everything = population(images, quality, seed=1).double()
            adapter, *layers = main_score(TASK, everything.sum(1)).tolist()
            truth = max(layers) - adapter
            estimates: dict[str, list[Estimate]] = {method: [] for method in METHODS}
            for _ in range(args.studies):
                chosen = rng.choice(POPULATION, args.images, replace=False)
                drawn = everything[:, chosen]
                for method, recovery in METHODS.items():
                    estimates[method].append(recovery(drawn, weights))
            print(f"{images}, {name}; {100 * truth:+.2f}", end="")
            for method, of_method in estimates.items():
                print(f"; {method}: {describe(of_method, truth)}", end="")
            print(flush=True)


def describe(estimates: list[Estimate], truth: float) -> str:
    """Return the mean error in points, covered, said to recover, and the mean half width in points."""
    error = np.mean([estimate.value for estimate in estimates]) - truth
    covered = 0
    said = 0
    widths = []
    for estimate in estimates:
        low, high = estimate.ci95
        covered += low <= truth <= high
        said += estimate.value >= MARGIN and low > 0
        widths.append(high - low)
    half_width = np.mean(widths) / 2
    return f"{100 * error:+.2f}, {covered}, {said}, {100 * half_width:.2f}"


if __name__ == "__main__":
    main()
