"""Starvation on flipped images: does the gap stay at early positions, or move with the image content?

    horizontal   left and right swapped: images stay plausible, and only the order within rows is reversed
    vertical     top and bottom swapped
    rotate       both: the raster order of the content is reversed

The frozen probes of both runs, trained on upright images, read the flipped ones. If a causal mask starves positions,
the gap appears at the first patches again, on other content. If the bidirectional model is only better at the content
of early patches, the gap moves with it. Flips hurt both models, and not equally. Where accuracy drops far, as it does
for upside-down images, rely on the horizontal flip.

Shapes: N images, T patches, R resamplings.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from llava_bidir.common.bootstrap import interval
from probes.results.probe_run import ProbeRun

from .patch_accuracy import (
    CountsByMask,
    accuracy_gap,
    count_run_patches,
    patch_accuracy,
    pooled_gap,
)

FLIP_AXES = {"horizontal": (1,), "vertical": (0,), "rotate": (0, 1)}


class FlippedDataset(Dataset):
    """A segmentation dataset with every image and its mask flipped."""

    def __init__(self, dataset: Dataset, flip: str):
        self.dataset = dataset
        self.axes = FLIP_AXES[flip]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]

        def flip(pixels):
            return np.ascontiguousarray(np.flip(pixels, self.axes))

        image = Image.fromarray(flip(np.asarray(sample["image"])))
        return {**sample, "image": image, "target": flip(sample["target"])}


def flipped_positions(grid: tuple[int, int], flip: str) -> Tensor:
    """Return the position of each patch's content in the flipped image, long[T]."""
    return torch.arange(grid[0] * grid[1]).view(*grid).flip(FLIP_AXES[flip]).flatten()


def flip_results(
    runs: dict[str, ProbeRun], site: str, flip: str, upright: CountsByMask, weights: Tensor
) -> dict:
    """Return an entry of "flips" in starvation.json, from the counts on `upright` images and bootstrap weights f[R, N].

    Returns:
        - "flip"
        - "causal", "bidirectional", "gap", "gap_ci95": by position in the flipped images
        - "patches": the first ones, which a causal mask starves: the first row, or up to three patches for a horizontal
          flip, which keeps that row on top
        - "upright", "position": the gap at these patches in upright and in flipped images
        - "content": the gap in flipped images at the patches that hold their content
        - "moved", "moved_ci95": position - content
        - "follows": "position", "content", "undecided" if the interval of "moved" contains zero, or "no gap" if that of
          "upright" is not above zero: then there is no gap that could follow anything
        - "correlation": of flipped and upright gaps, by position and by content
    """
    grid = tuple(runs["causal"].metrics["grid"])
    positions = flipped_positions(grid, flip)
    flipped = {
        mask: count_run_patches(run, site, FlippedDataset(run.dataset(), flip), "flipped")
        for mask, run in runs.items()
    }
    patches = list(range(grid[1] if flip != "horizontal" else min(3, grid[1] // 2)))
    content = positions[patches].tolist()
    gaps = accuracy_gap(*patch_accuracy(flipped, weights))
    pooled = {mask: counts.pool(patches, content) for mask, counts in flipped.items()}
    gap, resampled = (x["bidirectional"] - x["causal"] for x in patch_accuracy(pooled, weights))
    moved = (gap[0] - gap[1]).item()
    moved_ci95 = interval(moved, resampled[:, 0] - resampled[:, 1])
    old = torch.tensor(accuracy_gap(*patch_accuracy(upright, weights[:2]))["gap"])
    new = torch.tensor(gaps["gap"])

    def correlation(a: Tensor, b: Tensor) -> float:
        labelled = ~(a + b).isnan()
        return torch.corrcoef(torch.stack([a[labelled], b[labelled]]))[0, 1].item()

    before = pooled_gap(upright, weights, patches)
    if not before["gap_ci95"][0] > 0:
        follows = "no gap"
    else:
        if moved_ci95[0] > 0:
            follows = "position"
        elif moved_ci95[1] < 0:
            follows = "content"
        else:
            follows = "undecided"
    return {
        "flip": flip,
        **gaps,
        "patches": patches,
        "upright": before,
        "position": pooled_gap(flipped, weights, patches),
        "content": pooled_gap(flipped, weights, content),
        "moved": moved,
        "moved_ci95": moved_ci95,
        "follows": follows,
        "correlation": {
            "position": correlation(new, old),
            "content": correlation(new[positions], old),
        },
    }
