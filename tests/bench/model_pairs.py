"""Coverage and power of the comparison of two models on the same photos (probes/report/model_comparison.py).

    python tests/bench/model_pairs.py --pairs 200 --images 100

Two populations of images have known differences: none, or three points of mIoU at every layer. Pairs of studies are
drawn from them. A line for each: the true difference of best layers in points, how often its 95% interval covers it,
how often the report says that the models differ, and the mean half width.

Shapes: S sites, N images, M sums per image.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from probe_runs import CLASSES_TASK, random_counts, sums_of

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.evaluation.estimate import Estimate
from probes.evaluation.resampling import dataset_scores, resampled_scores
from probes.report.model_comparison import compare_runs, differs

POPULATION = 20_000
CLASSES = 8
RESAMPLINGS = 1000
SITES = ["adapter", "layer_01", "layer_02", "layer_03", "final_norm"]
QUALITY = [0.50, 0.55, 0.60, 0.58, 0.58]
SHIFTS = {"equal": 0.0, "apart": -0.026}  # of the pixel accuracy; about three points of mIoU


class Sample(SimpleNamespace):
    """What `compare_runs` reads of a run: some images of a population f[S, N, M]."""

    def __init__(self, population: torch.Tensor, images: np.ndarray):
        sums = population[:, images]
        scores = dataset_scores(CLASSES_TASK, sums)["miou"]
        layers = range(1, 4)
        peak = max(layers, key=lambda i: scores[i])
        super().__init__(
            sums=sums,
            sites=SITES,
            last_layer=SITES[3],
            peak_layer=SITES[peak],
            task=CLASSES_TASK,
            groups=None,
            weights=bootstrap_weights(len(images), RESAMPLINGS),
            metrics={"images": len(images), "classes": [f"class {k}" for k in range(CLASSES)]},
        )

    def site_scores(self) -> dict[str, Estimate]:
        """Return mIoU by site."""
        values = dataset_scores(self.task, self.sums)["miou"].tolist()
        drawn = resampled_scores(self.task, self.sums, self.weights)["miou"]
        return {site: Estimate(values[i], drawn[:, i]) for i, site in enumerate(self.sites)}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=200, help="studies of two models")
    parser.add_argument("--images", type=int, default=100, help="validation images of a study")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print("models  true difference  covered  said to differ  half width")
    for name, shift in SHIFTS.items():
        populations = [
            sums_of(random_counts([q + by for q in QUALITY], POPULATION, CLASSES, seed))
            for seed, by in ((1, 0.0), (2, shift))
        ]
        best = [dataset_scores(CLASSES_TASK, x)["miou"][1:4].max().item() for x in populations]
        truth = best[1] - best[0]
        found = []
        for _ in range(args.pairs):
            images = rng.choice(POPULATION, args.images, replace=False)
            found.append(compare_runs(*(Sample(x, images) for x in populations))["best"])
        covered = sum(low <= truth <= high for low, high in (x["ci95"] for x in found))
        said = sum(map(differs, found))
        widths = [(x["ci95"][1] - x["ci95"][0]) / 2 for x in found]
        print(
            f"{name}  {100 * truth:+.2f}  {covered} of {len(found)}  {said} of {len(found)}  "
            f"{100 * sum(widths) / len(widths):.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
