"""Coverage and power of the interval beyond random draws, judged alone and with the spread pooled over masks.

    python -m experiments.statistics.draws --studies 4000

Prints, for studies whose trained model is like any random one: how often the 95% interval covers zero, and the effect
whose interval would exclude zero in 80% of them, in points. The standard deviations are those of the toy world, in
points: of images 0.28 (600 of them) or 0.8 (60), of draws 0.35. The cells are two masks, as reports pool them, or four,
for two claims under both masks. Draws of cells can be correlated, since random weights are the same under both masks,
and the judged cell can have twice the spread of the others.
"""

import argparse
from itertools import product

import numpy as np
import torch

from probes.report.verdicts import interval_over_draws
from probes.score.estimate import Estimate

DRAW_SD = 0.35
Z = 1.959964


def simulate(
    studies: int, draws: int, cells: int, image_sd: float, correlation: float, ratio: float
) -> list[float]:
    """Return coverage and detectable effect, judged alone and pooled."""
    rng = np.random.default_rng(0)
    covariance = np.full((cells, cells), correlation) + (1 - correlation) * np.eye(cells)
    values = DRAW_SD * rng.multivariate_normal(np.zeros(cells), covariance, (studies, draws))
    values[..., 0] *= ratio  # the judged cell
    error = image_sd * rng.standard_normal(studies) - values[..., 0].mean(1)
    half = np.empty((2, studies))
    resampled = torch.tensor([-Z * image_sd, Z * image_sd])  # whose interval has this half width
    for i in range(studies):
        judged, *others = [
            Estimate(error[i], resampled, {"by_draw": by_draw}) for by_draw in values[i].T.tolist()
        ]
        for rule, pooled in enumerate(((), others)):
            low, high = interval_over_draws(judged, pooled)[0]
            half[rule, i] = (high - low) / 2
    alone, pooled = (np.abs(error) <= half).mean(1)
    effect_alone, effect_pooled = np.quantile(half - error, 0.8, axis=1)
    return [alone, effect_alone, pooled, effect_pooled]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=4000, help="simulated studies for each row")
    args = parser.parse_args()
    print(
        "image sd  draws  cells  correlation  spread   alone: coverage  effect   pooled: coverage  effect"
    )
    cases = [(0.0, 1.0), (0.5, 1.0), (0.9, 1.0), (0.0, 2.0), (0.5, 2.0)]
    for image_sd, draws, cells, (correlation, ratio) in product(
        (0.28, 0.8), (2, 3, 5), (2, 4), cases
    ):
        alone, effect, pooled, effect_pooled = simulate(
            args.studies,
            draws=draws,
            cells=cells,
            image_sd=image_sd,
            correlation=correlation,
            ratio=ratio,
        )
        case = f"{image_sd:8.2f}  {draws:5d}  {cells:5d}  {correlation:11.1f}  x{ratio:5.1f}   "
        print(f"{case}{alone:15.1%}  {effect:6.2f}   {pooled:16.1%}  {effect_pooled:6.2f}")


if __name__ == "__main__":
    main()
