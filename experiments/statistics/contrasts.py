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
            count = len(image)
            mean_patches = 4
            moved_by = shift
            if forward:
                mean_patches = 8
                moved_by = -shift
            patches = rng.geometric(1 / mean_patches, count)
            wrong_without_own = _draw_shares(rng, count)
            wrong_without_other = _draw_shares(rng, count)
            differences = []
            for effect in effects:
                share = wrong_without_own + effect + moved_by
                still_wrong = rng.binomial(patches, share)
                still_wrong -= rng.binomial(patches, wrong_without_other)
                differences.append(still_wrong / patches)
            values = np.stack(differences, 1)
            rows.append((values, patches, image, np.full(count, pair), np.full(count, forward)))
    values, patches, image, pair, forward = (
        torch.tensor(np.concatenate(column)) for column in zip(*rows, strict=True)
    )
    return PairedCases(
        values=values, patches=patches.double(), image=image, pair=pair, forward=forward
    )


def _draw_shares(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return the share of patches that stay wrong, by image."""
    return STILL_WRONG + IMAGE_SD * rng.uniform(-1, 1, count) * 3**0.5


def pooled(cases: PairedCases, weights: torch.Tensor) -> Estimate:
    """Return the mean over all patches, whatever their kind of mistake."""
    weights = weights.double()[:, cases.image] * cases.patches
    values = cases.values[:, 0]
    mean = values @ cases.patches / cases.patches.sum()
    resampled = weights @ values / weights.sum(1)
    return Estimate(mean.item(), resampled)


def study(rng: np.random.Generator, images: int) -> dict[str, float]:
    """Return what one study finds."""
    seed = int(rng.integers(1 << 30))
    weights = bootstrap_weights(images, RESAMPLINGS, seed=seed)
    cases = simulate(rng, images, [EFFECT])
    (estimate,) = contrast_estimates(cases, weights)
    low, high = estimate.ci95
    shifted = simulate(rng, images=images, effects=[0.0], shift=SHIFT)
    (balanced,) = contrast_estimates(shifted, weights)
    judged = compare_models(rng, images, weights)
    other_mask = compare_models(rng, images, weights)
    interval, _ = interval_over_draws(judged, [other_mask])
    return {
        "covers": inside(EFFECT, (low, high)),
        "shift": 1 - inside(0, balanced.ci95),
        "pooled": 1 - inside(0, pooled(shifted, weights).ci95),
        "beyond": inside(EFFECT, interval),
        "half": 50 * (high - low),
    }


def compare_models(rng: np.random.Generator, images: int, weights: torch.Tensor) -> Estimate:
    """Return the contrast of a model beyond those of random ones, under a mask."""
    effects = [EFFECT, *rng.normal(0, DRAW_SD, DRAWS)]
    model, *draws = contrast_estimates(simulate(rng, images, effects), weights)
    return compare_to_draws(model, draws)


def inside(value: float, ci95: tuple[float, float]) -> float:
    """Return 1 if an interval has a value, 0 if not."""
    low, high = ci95
    return float(low <= value <= high)


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
        columns = "  ".join(f"{share:6.1%}" for share in shares)
        print(f"{images:6d}  {columns}  {half:6.1f}")


if __name__ == "__main__":
    main()
