"""Starvation with the images turned: does the gap stay at early positions, or go with what the image shows there?

    horizontal   left and right swapped: pictures stay likely, and only the order within rows turns
    vertical     top and bottom swapped
    rotate       both: the raster order of what is shown is reversed

Both runs' frozen probes, trained on upright images, read the turned ones. If masks starve positions, the gap at the
first patches is there again, on what used to be elsewhere; if the bidirectional model is merely better at what images
show first, it is now where that lies. Compared are gaps, but turned pictures hurt both models, and not alike: where
accuracy falls far, as it does upside down, trust the horizontal flip.

Shapes: N images, T patches, R resamplings.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llava_bidir.common.bootstrap import interval
from probes.data.batches import PreprocessedDataset, collate, group_by_mask_size
from probes.evaluation.metrics import count
from probes.results.probe_run import ProbeRun

from .patch_accuracy import Pair, PatchCounts, accuracies, gap_of, gap_over

FLIPS = ("horizontal", "vertical", "rotate")


class Turned(Dataset):
    """A segmentation dataset with every image and its mask turned."""

    def __init__(self, dataset: Dataset, flip: str):
        self.dataset = dataset
        self.axes = {"horizontal": (1,), "vertical": (0,), "rotate": (0, 1)}[flip]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        sample = self.dataset[index]
        turn = lambda pixels: np.ascontiguousarray(np.flip(pixels, self.axes))
        image = Image.fromarray(turn(np.asarray(sample["image"])))
        return {**sample, "image": image, "target": turn(sample["target"])}


def turned_patches(grid: tuple[int, int], flip: str) -> Tensor:
    """Where the patch that lay at each position lies in the turned image, long[T]."""
    at = torch.arange(grid[0] * grid[1]).view(*grid)
    return at.flip({"horizontal": (1,), "vertical": (0,), "rotate": (0, 1)}[flip]).flatten()


@torch.no_grad()
def score_patches(run: ProbeRun, site: str, dataset: Dataset, batch_size: int = 32) -> PatchCounts:
    """Counts by patch of a run's frozen probe on other images than the run was scored on."""
    mllm, head = run.mllm(), run.probes()[site]
    head.to(mllm.device)
    right, valid = [], []
    loader = DataLoader(PreprocessedDataset(dataset, mllm.preprocess), batch_size, collate_fn=collate)
    for batch in tqdm(loader, desc=f"turned, {run.metrics['image_attention']}", mininterval=5):
        logits = head(mllm.states(batch["pixels"], [site])[site].float())
        logits = logits.transpose(-1, -2).unflatten(-1, mllm.grid)[None]
        patches = torch.empty(2, len(logits[0]), mllm.grid[0] * mllm.grid[1], dtype=torch.long)
        for images, target in group_by_mask_size(batch["target"]):
            view = mllm.geometry.view(tuple(target.shape[-2:]))
            counts = count(logits[:, images], target.to(mllm.device), view)
            patches[0, images], patches[1, images] = counts.patch_right[0].cpu(), counts.patch_valid.cpu()
        right.append(patches[0])
        valid.append(patches[1])
    return PatchCounts(torch.cat(right).double(), torch.cat(valid).double())


def flip_facts(runs: dict[str, ProbeRun], site: str, flip: str, upright: Pair, weights: Tensor) -> dict:
    """An entry of what starvation.json holds under "flips".

    Args:
        runs: By mask.
        site: Where both are compared.
        flip: One of `FLIPS`.
        upright: Counts on the images as they are.
        weights: f[R, N] of the bootstrap.

    Returns:
        {"flip"; "causal", "bidirectional", "gap", "gap_ci95": by position in the turned images; "patches": the first
        ones, that a causal mask starves (the first row; of a horizontal flip, up to three: that row stays on top);
        "upright", "position", "content": the gap there in upright images, there in turned ones, and in these where what
        upright images show there lies; "moved", "moved_ci95": position - content; "follows": "position", "content" or,
        where the interval holds zero, "undecided"; "correlation": of the turned gaps with the upright ones, by position
        and by content}
    """
    first = next(iter(runs.values()))
    grid = tuple(first.metrics["grid"])
    goes_to = turned_patches(grid, flip)
    turned = {mask: score_patches(run, site, Turned(run.dataset(), flip)) for mask, run in runs.items()}
    patches = list(range(grid[1] if flip != "horizontal" else min(3, grid[1] // 2)))
    content = goes_to[patches].tolist()
    gaps = gap_of(*accuracies(turned, weights))
    at, where_now = gap_over(turned, weights, patches), gap_over(turned, weights, content)
    moved, moved_ci95 = _gap_difference(turned, weights, patches, content)
    old, new = torch.tensor(gap_of(*accuracies(upright, weights[:2]))["gap"]), torch.tensor(gaps["gap"])
    correlation = lambda a, b: torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    return {
        "flip": flip,
        **gaps,
        "patches": patches,
        "upright": gap_over(upright, weights, patches),
        "position": at,
        "content": where_now,
        "moved": moved,
        "moved_ci95": moved_ci95,
        "follows": "position" if moved_ci95[0] > 0 else "content" if moved_ci95[1] < 0 else "undecided",
        "correlation": {"position": correlation(new, old), "content": correlation(new[goes_to], old)},
    }


def _gap_difference(counts: Pair, weights: Tensor, a: list[int], b: list[int]) -> tuple[float, list[float]]:
    """The gap over patches `a` minus that over `b`, with its interval."""
    estimates = []
    for patches in (a, b):
        together = {mask: pixels.over(patches) for mask, pixels in counts.items()}
        estimates.append([x["bidirectional"] - x["causal"] for x in accuracies(together, weights)])
    (gap_a, drawn_a), (gap_b, drawn_b) = estimates
    value = (gap_a - gap_b).item()
    return value, interval(value, (drawn_a - drawn_b)[:, 0])
