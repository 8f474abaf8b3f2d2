"""Coverage and level of the intervals of knockout contrasts, by simulation.

    python -m experiments.statistics.contrasts --studies 1000

A study has pairs of classes, and twice as many patches with one kind of mistake as with the other. Whether a patch is
still wrong depends on chance, on its image, on whether the class's own or other tokens are blocked, and on a shift of
the probe's criterion, which corrects one kind of mistake and adds to the other. Prints, for each number of images:

    covers       how often the 95% interval over images covers the true contrast; 95% is right
    shift        how often it excludes zero where only the criterion shifts; 5% is right
    pooled       the same if all patches are pooled instead of balanced within pairs
    beyond       how often the interval beyond random LLMs covers: three draws under each of two masks
    half         its half width in points for one model
"""

import argparse

import numpy as np
import torch

from llava_bidir.common.bootstrap import bootstrap_weights
from probes.analyses.knockout.knockout_effects import PairedCases, contrast_estimates
from probes.report.verdicts import compare_to_draws, interval_over_draws
from probes.score.estimate import Estimate

# shares of mistaken patches
STILL_WRONG = 0.6
EFFECT = 0.05
SHIFT = 0.1
IMAGE_SD = 0.1
DRAW_SD = 0.03
PAIRS = 4
DRAWS = 3
RESAMPLINGS = 400


def simulate(
    rng: np.random.Generator, images: int, effects: list[float], shift: float = 0.0
) -> PairedCases:
    """Return the cases of a study, with the true contrast of each model; half of the images have cases of a pair."""
    rows = []
    for pair in range(PAIRS):
        for forward in (True, False):
            image = np.flatnonzero(rng.random(images) < 0.5)
            patches = rng.geometric(1 / 8 if forward else 1 / 4, len(image))
            own, other = (
                STILL_WRONG + IMAGE_SD * rng.uniform(-1, 1, len(image)) * 3**0.5 for _ in range(2)
            )
            moved = [own + effect + (-shift if forward else shift) for effect in effects]
            left = [
                (rng.binomial(patches, p) - rng.binomial(patches, other)) / patches for p in moved
            ]
            same = [np.full(len(image), x) for x in (pair, forward)]
            rows.append((np.stack(left, 1), patches, image, *same))
    values, patches, image, pair, forward = (
        torch.tensor(np.concatenate(x)) for x in zip(*rows, strict=True)
    )
    return PairedCases(
        values=values, patches=patches.double(), image=image, pair=pair, forward=forward
    )


def pooled(cases: PairedCases, weights: torch.Tensor) -> Estimate:
    """Return the mean over all patches, whatever their kind of mistake."""
    weights = weights.double()[:, cases.image] * cases.patches
    values = cases.values[:, 0]
    resampled = weights @ cases.values[:, 0] / weights.sum(1)
    return Estimate((values @ cases.patches / cases.patches.sum()).item(), resampled)


def study(rng: np.random.Generator, images: int) -> dict[str, float]:
    """Return what one study finds."""
    weights = bootstrap_weights(images, RESAMPLINGS, seed=int(rng.integers(1 << 30)))

    def inside(x, ci95):
        return float(ci95[0] <= x <= ci95[1])

    cases = simulate(rng, images, [EFFECT])
    (estimate,) = contrast_estimates(cases, weights)
    found = estimate.ci95
    shifted = simulate(rng, images=images, effects=[0.0], shift=SHIFT)

    def excludes(estimate):
        return 1 - inside(0, estimate.ci95)

    own, other = (
        compare_to_draws(first, draws)
        for first, *draws in (
            contrast_estimates(
                simulate(rng, images, [EFFECT, *rng.normal(0, DRAW_SD, DRAWS)]), weights
            )
            for _ in range(2)
        )
    )
    beyond = inside(EFFECT, interval_over_draws(own, [other])[0])
    shares = {
        "covers": inside(EFFECT, found),
        "shift": excludes(contrast_estimates(shifted, weights)[0]),
    }
    shares |= {"pooled": excludes(pooled(shifted, weights)), "beyond": beyond}
    return shares | {"half": 50 * (found[1] - found[0])}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--studies", type=int, default=1000, help="simulated studies for each row")
    args = parser.parse_args()
    print("images  covers   shift  pooled  beyond    half")
    for images in (12, 25, 60, 200, 600):
        rng = np.random.default_rng(images)
        rows = [study(rng, images) for _ in range(args.studies)]
        *shares, half = (np.nanmean([row[key] for row in rows]) for key in rows[0])
        print(f"{images:6d}  " + "  ".join(f"{x:6.1%}" for x in shares) + f"  {half:6.1f}")


if __name__ == "__main__":
    main()
