"""Starvation read by a probe for each position: how much of the gap is the shared probe's?

The paper's probe is shared by all positions. Under a causal mask, states of early patches differ from later ones, so
that a shared probe can serve them badly although they have the information. Two probes in closed form, solved from the
same moments of the training split, differ in nothing but the sharing (position_probes.py):

    shared     one discriminant for all positions
    own        a discriminant for each position: its own class means, covariance and class frequencies, shrunk
               towards those of all positions
    read_out   the gap under "shared" minus the gap under "own": what a shared probe adds to it

"read_out" is about discriminants. A shared probe at the optimum of the loss (`probes solve`) can read early patches
better than a shared discriminant: if its gap is that of "own", the shared probe was far from its optimum, no more.

Strength and shrinkage are chosen by cross-validation over training images. Where memory has no room for a covariance
per position, only the first rows have probes of their own, at least two.

Both are also read at the adapter, whose states no mask has touched yet: a gap there comes from training, not from
attention.

Shapes: N images, T patches, K classes, R resamplings.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_bidir.common.bootstrap import interval
from llava_bidir.common.errors import UserError
from probes.data.available_memory import available_memory
from probes.data.batches import MaskPreparer, PreprocessedDataset, collate
from probes.data.samplers import assign_folds, fold_batches
from probes.ops.cross_entropy import upsampled_cross_entropy
from probes.ops.quadrature import PreparedMasks
from probes.results.probe_run import ProbeRun
from probes.training.closed_form import STRENGTHS as ALL_STRENGTHS
from probes.training.optimum import TIGHT_NODES

from .dummy_tokens import load_with_tokens
from .patch_accuracy import CountsByMask, PatchCounts, accuracy_gap, count_patches, patch_accuracy
from .position_probes import PositionMoments, PositionProbes

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM

FOLDS = 4  # the default of `probes solve`
BATCH_SIZE = 32  # images per forward
STRENGTHS = ALL_STRENGTHS[::4]  # decades: with each, every shrinkage is scored
# s of position_probes.py; not 0, since a position whose pixels are all ignored has no moments of its own.
SHRINKAGES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
KINDS = {"shared": SHRINKAGES[-1:], "own": SHRINKAGES}  # to choose from

Batch = tuple[int, dict[str, Tensor], PreparedMasks]  # fold, states f[B, T, d] by site, B masks


def position_results(
    runs: dict[str, ProbeRun], sites: list[str], weights: Tensor, dummy_tokens: int = 0
) -> dict[str, Any]:
    """Return "by_position" of starvation.json.

    Args:
        runs: The runs by mask.
        sites: Sites to read, without duplicates.
        weights: Of the bootstrap, f[R, N].
        dummy_tokens: Tokens to insert before the image, in training images too.

    Returns:
        {"folds", "strengths", "shrinkages": what was chosen from; "positions": the first ones, which have probes of
        their own; "sites": an entry for each}. An entry is {"site", "shared", "own": each {"causal",
        "bidirectional", "gap", "gap_ci95": by patch, "first_row"}; "read_out": {"gap", "gap_ci95", "first_row"}, shared
        minus own; "chosen": by mask and probe "strength", "shrinkage" and "cv_cross_entropy" in nats per pixel}.
    """
    columns = runs["causal"].metrics["grid"][1]
    counts: dict[tuple[str, str], CountsByMask] = {(s, kind): {} for s in sites for kind in KINDS}
    chosen: dict[str, dict[str, Any]] = {s: {} for s in sites}
    positions = None
    for mask, run in runs.items():
        mllm = load_with_tokens(run, dummy_tokens)
        positions = positions or count_positions(mllm, sites, len(run.metrics["classes"]))
        probes, settings = solve_probes(run, mllm, sites, positions)
        pairs, title = [(s, probes[s, kind]) for s, kind in counts], f"validation images, {mask}"
        for key, found in zip(counts, count_patches(mllm, run.dataset(), pairs, title, BATCH_SIZE), strict=True):
            counts[key][mask] = found
        for s in sites:
            chosen[s][mask] = {kind: settings[s, kind] for kind in KINDS}
    entries = []
    for s in sites:
        by_kind = {kind: _with_first_row(counts[s, kind], columns) for kind in KINDS}
        entry = {kind: _split(accuracy_gap(*patch_accuracy(found, weights))) for kind, found in by_kind.items()}
        read_out = _read_out(by_kind["shared"], by_kind["own"], weights)
        entries.append({"site": s, **entry, "read_out": _split(read_out), "chosen": chosen[s]})
    choices = {"folds": FOLDS, "strengths": list(STRENGTHS), "shrinkages": list(SHRINKAGES)}
    return {**choices, "positions": positions, "sites": entries}


# -------------------------------------------------------------------------------------------------------------- probes
def count_positions(mllm: "FrozenMLLM", sites: list[str], classes: int) -> int:
    """Return the number of positions whose moments fit into half of the memory: all, or those of the first rows.

    Raises:
        UserError: Not even two rows fit; pixels of the first row are interpolated between both.
    """
    rows, columns = mllm.grid
    row = 8 * FOLDS * columns * sum(mllm.widths[site] * (mllm.widths[site] + classes) for site in sites)
    available = torch.cuda.mem_get_info(mllm.device)[0] if mllm.device.type == "cuda" else available_memory()
    fit = min(rows, int(available / 2 / row))
    if fit < min(rows, 2):
        raise UserError(
            f"--own-probe needs {2 * row / 1e9:.3g} GB for probes of the first two rows at {' and '.join(sites)}, but "
            f"only half of {available / 1e9:.3g} GB may be used; use a machine with more memory"
        )
    return fit * columns


def solve_probes(
    run: ProbeRun, mllm: "FrozenMLLM", sites: list[str], positions: int
) -> tuple[dict[tuple[str, str], PositionProbes], dict[tuple[str, str], dict[str, Any]]]:
    """Return the probes by site and kind ("shared", "own"), and what was chosen for each.

    Two passes over the training images: moments of all folds, then the loss of each fold under the probes of the
    others. Strength and shrinkage are those of the lowest loss.
    """
    training = run.dataset("training")
    fold_of = assign_folds(len(training), FOLDS, training.groups)
    batches = lambda: training_batches(run, mllm, sites, fold_of)
    moments = sum_moments(batches(), mllm, positions, len(run.metrics["classes"]))
    losses, pixels = cross_validate(batches(), mllm, moments)
    probes, settings = {}, {}
    for site, sums in moments.items():
        for kind, shrinkages in KINDS.items():
            found = losses[site][-len(shrinkages) :]
            shrinkage, strength = divmod(int(found.argmin()), len(STRENGTHS))
            settings[site, kind] = {"strength": STRENGTHS[strength], "shrinkage": shrinkages[shrinkage]}
            settings[site, kind]["cv_cross_entropy"] = found.min().item() / pixels
            solved = sums.solve([STRENGTHS[strength]], shrinkages[shrinkage])
            probes[site, kind] = PositionProbes(solved.pivot, solved.weights[0], solved.bias[0])
    return probes, settings


def training_batches(run: ProbeRun, mllm: "FrozenMLLM", sites: list[str], fold_of: Tensor) -> Iterator[Batch]:
    """Yield the training images of a run, fold by fold."""
    prepare = MaskPreparer(mllm.geometry, len(run.metrics["classes"]), TIGHT_NODES)
    images = PreprocessedDataset(run.dataset("training"), mllm.preprocess, prepare)
    loader = DataLoader(images, batch_sampler=fold_batches(fold_of, BATCH_SIZE), collate_fn=collate)
    for batch in tqdm(loader, desc=f"training images, {run.metrics['image_attention']}", mininterval=5):
        yield int(fold_of[batch["index"][0]]), mllm.states(batch["pixels"], sites), batch["masks"].to(mllm.device)


def sum_moments(
    batches: Iterator[Batch], mllm: "FrozenMLLM", positions: int, classes: int
) -> dict[str, PositionMoments]:
    """Return the moments of each site."""
    moments: dict[str, PositionMoments] = {}
    tokens = mllm.grid[0] * mllm.grid[1]
    for fold, states, masks in batches:
        labels = masks.soft.flatten(2).mT.double()
        for site, x in states.items():
            if site not in moments:
                pivot = x.flatten(0, 1).float().mean(0)
                moments[site] = PositionMoments(pivot, FOLDS, tokens, positions, classes)
            moments[site].update(x, labels, fold)
    return moments


@torch.no_grad()
def cross_validate(
    batches: Iterator[Batch], mllm: "FrozenMLLM", moments: dict[str, PositionMoments]
) -> tuple[dict[str, Tensor], int]:
    """Return the summed losses of each site by shrinkage and strength, f64[S, R], and the number of pixels.

    Every image is scored by the probes of the other folds, with the loss of `probes solve`.
    """
    losses = {site: torch.zeros(len(SHRINKAGES), len(STRENGTHS), dtype=torch.double) for site in moments}
    current, probes, pixels = None, {}, 0
    for fold, states, masks in batches:
        if fold != current:  # folds come one after the other, so that the probes of one are in memory at a time
            current = fold
            for site, sums in moments.items():
                probes[site] = [sums.solve(STRENGTHS, shrinkage, fold) for shrinkage in SHRINKAGES]
        pixels += int(masks.pixels.sum())
        for site, x in states.items():
            for i, probe in enumerate(probes[site]):
                logits = probe(x).transpose(-1, -2).unflatten(-1, mllm.grid)
                losses[site][i] += upsampled_cross_entropy(logits, masks, reduction="sum").cpu().double()
    return losses, pixels


# ------------------------------------------------------------------------------------------------------------- results
def _with_first_row(counts: CountsByMask, columns: int) -> CountsByMask:
    """Return counts with the first row, pooled, as one more patch at the end."""
    extend = lambda x: torch.cat([x, x[:, :columns].sum(1, keepdim=True)], 1)
    return {mask: PatchCounts(*map(extend, pair)) for mask, pair in counts.items()}


def _split(values: dict[str, list]) -> dict[str, Any]:
    """Return the values of the patches, and those of the last one as "first_row"."""
    return {k: v[:-1] for k, v in values.items()} | {"first_row": {k: v[-1] for k, v in values.items()}}


def _read_out(shared: CountsByMask, own: CountsByMask, weights: Tensor) -> dict[str, list]:
    gaps = [[x["bidirectional"] - x["causal"] for x in patch_accuracy(counts, weights)] for counts in (shared, own)]
    (value, resampled) = (a - b for a, b in zip(*gaps, strict=True))
    return {
        "gap": value.tolist(),
        "gap_ci95": [interval(v, resampled[:, i]) for i, v in enumerate(value.tolist())],
    }
