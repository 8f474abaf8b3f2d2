"""What two protocols that know patches only say of the states of a solved run, scored on pixels.

    python -m experiments.leaderboard.patch_protocols RUN ...

RUN is a finished run of `probes solve` that squashes its photos. Written to RUN/patch_protocols.json, mIoU by site:

    patch labels    scikit-learn's LogisticRegression with its defaults, on the class of most pixels of each patch. Its
                    logits are upsampled to each mask, as those of solved probes are.
    kNN             the shares of classes in the 30 training patches that are nearest by the cosine, weighted by
                    exp(cosine / 0.02), upsampled likewise. Source: Hummingbird (2306.01667); all patches are in memory.

The solved probes of the run are scored on the same states by the same function, and must read what the run says.

Shapes: N photos, T patches on a grid h x w, d channels, K classes, H W pixels.
"""

import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from llava_bidir.common.files import write_files
from probes.runs.read import ProbeRun

IGNORED = 255
NEIGHBOURS = 30
TEMPERATURE = 0.02
BATCH = 16  # photos of a forward
QUERIES = 1024  # patches whose neighbours are looked for at a time
AGREES = 2e-4  # mIoU of solved probes here and in the run: rounding moves single pixels
FILE = "patch_protocols.json"


class Split(NamedTuple):
    """Photos of a split: states f32[N, T, d] by site, and N masks uint8[H, W]."""

    states: dict[str, Tensor]
    masks: list[Tensor]


@torch.inference_mode()
def read_split(run: ProbeRun, split: str) -> Split:
    """Return the states and the masks of a split."""
    model = run.mllm()
    photos = run.dataset(split)
    states: dict[str, list[Tensor]] = {site: [] for site in run.sites}
    masks = []
    for start in range(0, len(photos), BATCH):
        end = min(start + BATCH, len(photos))
        batch = [photos[i] for i in range(start, end)]
        pixels = model.preprocess([photo["image"] for photo in batch])
        states_of_batch = model.states(pixels, sites=run.sites)
        for site, batches in states.items():
            batches.append(states_of_batch[site].float().cpu())
        masks += [torch.tensor(photo["target"]) for photo in batch]
    joined = {site: torch.cat(batches) for site, batches in states.items()}
    return Split(joined, masks)


def patch_shares(masks: list[Tensor], grid: tuple[int, int], classes: int) -> Tensor:
    """Return the share of each class among the pixels of each patch, f32[N, T, K]; they add up to what is labelled."""
    shares = []
    for mask in masks:
        labels = mask.long().clamp(max=classes)
        one_hot = F.one_hot(labels, classes + 1)[..., :classes]
        maps = one_hot.permute(2, 0, 1).float()
        pooled = F.adaptive_avg_pool2d(maps, grid)
        shares.append(pooled.flatten(1).T)
    return torch.stack(shares)


def score(logits: Tensor, masks: list[Tensor], grid: tuple[int, int]) -> float:
    """Return the mIoU of predictions f[N, T, K] of patches, upsampled to each mask."""
    classes = logits.shape[2]
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for photo, mask in zip(logits, masks, strict=True):
        maps = photo.T.reshape(1, classes, *grid)
        upsampled = F.interpolate(maps, mask.shape, mode="bilinear", align_corners=False)
        labelled = mask != IGNORED
        truth = mask[labelled].long()
        predicted = upsampled[0].argmax(0)[labelled]
        pairs = classes * truth + predicted
        counts = torch.bincount(pairs, minlength=classes**2)
        matrix += counts.view(classes, classes)
    right = matrix.diagonal().double()
    union = matrix.sum(0) + matrix.sum(1) - right
    return (right / union).nanmean().item()


def fit_patch_labels(states: Tensor, shares: Tensor, queries: Tensor) -> tuple[Tensor, bool]:
    """Return logits f32[N', T, K] of photos f[N', T, d], and whether scikit-learn says that it has converged.

    Args:
        states: Training states f[N, T, d].
        shares: Their labels f[N, T, K].
        queries: States of the photos.
    """
    labelled = shares.sum(2) > 0
    labels = shares.argmax(2)[labelled]
    patches = states[labelled]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        regression = LogisticRegression().fit(patches.numpy(), labels.numpy())
    weight = torch.tensor(regression.coef_).float()
    bias = torch.tensor(regression.intercept_).float()
    # a class that is the largest of no patch is never predicted; -inf would spread by the interpolation
    shape = (*queries.shape[:2], shares.shape[2])
    logits = torch.full(shape, -1e4)
    logits[..., regression.classes_] = queries @ weight.T + bias
    return logits, not said


def find_neighbours(states: Tensor, shares: Tensor, queries: Tensor) -> Tensor:
    """Return shares of classes f32[N', T, K] of photos f[N', T, d], from their nearest training patches."""
    memory = F.normalize(states.flatten(0, 1), dim=1)
    labels = shares.flatten(0, 1)
    shares_near = []
    patches = F.normalize(queries.flatten(0, 1), dim=1)
    for batch in patches.split(QUERIES):
        cosine, nearest = (batch @ memory.T).topk(NEIGHBOURS)
        weights = (cosine / TEMPERATURE).softmax(1)
        weighted = weights[..., None] * labels[nearest]
        shares_near.append(weighted.sum(1))
    photos, tokens, _ = queries.shape
    return torch.cat(shares_near).view(photos, tokens, -1)


def measure(run: ProbeRun) -> dict[str, dict[str, float | bool]]:
    """Return what each protocol says of each site."""
    training = read_split(run, "training")
    validation = read_split(run, "validation")
    grid = tuple(run.metrics["grid"])
    shares = patch_shares(training.masks, grid, len(run.metrics["classes"]))
    probes = run.probes()
    scores: dict[str, dict[str, float | bool]] = {}
    for site in run.metrics["sites"]:
        name = site["site"]
        queries = validation.states[name]
        with torch.inference_mode():
            solved = probes[name](queries)
            exact = score(solved, validation.masks, grid)
            if abs(exact - site["miou"]) > AGREES:
                raise SystemExit(f"{run.path}, {name}: {exact} here, {site['miou']} in the run")
            states = training.states[name]
            logits, converged = fit_patch_labels(states, shares, queries)
            near = find_neighbours(states, shares, queries)
            scores[name] = {
                "exact": exact,
                "patch labels": score(logits, validation.masks, grid),
                "patch labels converged": converged,
                "kNN": score(near, validation.masks, grid),
            }
        print(run.path, name, scores[name], flush=True)
    return scores


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for path in parser.parse_args().runs:
        write_files({path / FILE: measure(ProbeRun(path))})


if __name__ == "__main__":
    main()
