"""How often the report says of equal models that one is better (probes/report/best_layers.py).

    python -m experiments.statistics.which_is_better --studies 500 [--runs RUN OTHER]

Populations are those of `model_pairs.py`: equal models whose layers differ ("peaked") or not ("flat"). A line for each
and each number of photos: how often two models are said to differ, and how often any of four is. With two runs, of
whose photos some are drawn and change places at random, the models are equal by exchange.

Shapes: S sites, N images, M sums per image.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch

from probes.report.best_layers import BETTER, WORSE, correct_for_pairs
from probes.report.compare import compare_best_layers
from probes.runs.read import ProbeRun

from .model_pairs import CLASSES, POPULATION, SCENES, Sample, population

EQUAL = ("all classes, equal", "three of 20, equal and peaked", "three of 20, equal and flat")
PHOTOS = (20, 60, 100)
MODELS = 4


def any_differs(samples: Sequence[Sample]) -> bool:
    """Return whether the report says of any two models that one is better."""
    rows = []
    about = {"task": "segmentation", "data": "a", "seed": None}
    for first, second in combinations(samples, 2):
        rows += [about | row for row in compare_best_layers(first, second)]
    correct_for_pairs(rows)
    return any(row["finding"] in (BETTER, WORSE) for row in rows)


def exchanged(runs: Sequence[ProbeRun], photos: int, rng: np.random.Generator) -> list[Sample]:
    """Return two models on some photos, which have changed places at random."""
    sites = [site for site in runs[0].layers if site in runs[1].layers]
    first, second = (run.sums_at(sites) for run in runs)
    swapped = torch.tensor(rng.random(first.shape[1]) < 0.5)[None, :, None]
    images = rng.choice(first.shape[1], photos, replace=False)
    classes = len(runs[0].metrics["classes"])
    return [
        Sample(torch.where(swapped, second, first), images, classes, sites=sites),
        Sample(torch.where(swapped, first, second), images, classes, sites=sites),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--runs", nargs=2, default=())
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    if args.runs:
        runs = [ProbeRun(path) for path in args.runs]
        for photos in PHOTOS:
            if photos <= runs[0].metrics["images"]:
                said = sum(any_differs(exchanged(runs, photos, rng)) for _ in range(args.studies))
                print(f"exchanged photos of two runs; {photos} photos; {said}", flush=True)
    for scene in EQUAL:
        kind, _, _ = scene.partition(",")
        quality = SCENES[scene][0]
        models = [population(scene, quality, seed) for seed in range(1, MODELS + 1)]
        for photos in PHOTOS:
            of_two = of_four = 0
            for _ in range(args.studies):
                images = rng.choice(POPULATION, photos, replace=False)
                samples = [Sample(everything, images, CLASSES[kind]) for everything in models]
                of_two += any_differs(samples[:2])
                of_four += any_differs(samples)
            print(f"{scene}; {photos} photos; two: {of_two}; four: {of_four}", flush=True)


if __name__ == "__main__":
    main()
