"""Starvation read by a probe for each position: how much of the gap is the shared probe's?

The paper's probe is shared by all positions. Under a causal mask, states of early patches differ from later ones, so
that a shared probe can serve them badly although they have the information. Two probes in closed form, solved from the
same moments of the training split, differ in nothing but the sharing (probes/training/position_probes.py):

    shared     one discriminant for all positions
    own        a discriminant for each position, with class means and frequencies of its own
    read_out   the gap under "shared" minus the gap under "own": what a shared probe adds to it

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
from probes.data.batches import PreprocessedDataset, collate, group_by_mask_size
from probes.data.samplers import assign_folds, fold_batches
from probes.models.sites import ADAPTER
from probes.ops.cross_entropy import soft_labels
from probes.results.probe_run import ProbeRun
from probes.training.position_probes import (
    SHRINKAGES,
    STRENGTHS,
    PositionMoments,
    PositionProbes,
    choose,
    solve_positions,
    token_losses,
)

from .patch_accuracy import CountsByMask, PatchCounts, accuracy_gap, count_patches, patch_accuracy

if TYPE_CHECKING:  # a report needs no model
    from probes.models.frozen_mllm import FrozenMLLM

FOLDS = 4  # the default of `probes solve`
BATCH_SIZE = 32  # images per forward
KINDS = {"shared": SHRINKAGES[-1:], "own": SHRINKAGES}  # shrinkages to choose from

Batch = tuple[int, dict[str, Tensor], Tensor]  # fold, states f[B, T, d] by site, soft labels f64[B, T, K]


def position_results(runs: dict[str, ProbeRun], site: str, weights: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return "by_position" of starvation.json, from bootstrap weights f[R, N].

    Returns:
        {"folds", "strengths", "shrinkages": what was chosen from; "sites": entries of `site` and of the adapter}. An
        entry is {"site", "shared", "own": each {"causal", "bidirectional", "gap", "gap_ci95": by patch, "first_row"};
        "read_out": {"gap", "gap_ci95", "first_row"}, shared minus own; "chosen": by mask and probe "strength",
        "shrinkage" by patch, and "cv_cross_entropy" in nats per pixel}.
    """
    sites, columns = list(dict.fromkeys([site, ADAPTER])), runs["causal"].metrics["grid"][1]
    counts: dict[tuple[str, str], CountsByMask] = {(s, kind): {} for s in sites for kind in KINDS}
    chosen: dict[str, dict[str, Any]] = {s: {} for s in sites}
    for mask, run in runs.items():
        mllm = run.mllm()
        probes, settings = solve_probes(run, mllm, sites, seed)
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
    return {"folds": FOLDS, "strengths": list(STRENGTHS), "shrinkages": list(SHRINKAGES), "sites": entries}


def own_probe_effects(starvation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {"value", "ci95"} of the gaps that the probe of each position sees, from starvation.json.

    Keys are "starvation" (patch 0) and "starvation_first_row"; none if the file has no "by_position".
    """
    if "by_position" not in starvation:
        return {}
    own = starvation["by_position"]["sites"][0]["own"]
    return {
        "starvation": {"value": own["gap"][0], "ci95": own["gap_ci95"][0]},
        "starvation_first_row": {"value": own["first_row"]["gap"], "ci95": own["first_row"]["gap_ci95"]},
    }


# -------------------------------------------------------------------------------------------------------------- probes
def solve_probes(
    run: ProbeRun, mllm: "FrozenMLLM", sites: list[str], seed: int
) -> tuple[dict[tuple[str, str], PositionProbes], dict[tuple[str, str], dict[str, Any]]]:
    """Return the probes by site and kind ("shared", "own"), and what was chosen for each; see `position_results`.

    Two passes over the training images: moments of all folds, then the losses of each fold under the probes of the
    others.
    """
    training = run.dataset("training")
    fold_of = assign_folds(len(training), FOLDS, seed, training.groups)
    moments = sum_moments(training_batches(run, mllm, sites, fold_of))
    losses = cross_validate(training_batches(run, mllm, sites, fold_of), moments)
    probes, settings = {}, {}
    for site, sums in moments.items():
        for kind, shrinkages in KINDS.items():
            found = losses[site][-len(shrinkages) :]
            strength, chosen = choose(found)
            loss = found[chosen, strength, torch.arange(len(chosen))].sum() / sums.count.sum().cpu()
            probes[site, kind] = PositionProbes.solve(sums, STRENGTHS[strength], shrinkages, chosen)
            settings[site, kind] = {
                "strength": STRENGTHS[strength],
                "shrinkage": [shrinkages[i] for i in chosen],
                "cv_cross_entropy": loss.item(),
            }
    return probes, settings


def training_batches(run: ProbeRun, mllm: "FrozenMLLM", sites: list[str], fold_of: Tensor) -> Iterator[Batch]:
    """Yield the training images of a run, fold by fold, with the label stride of its probes."""
    images = PreprocessedDataset(run.dataset("training"), mllm.preprocess)
    classes, stride = len(run.metrics["classes"]), run.manifest["config"].get("label_stride") or 1
    loader = DataLoader(images, batch_sampler=fold_batches(fold_of, BATCH_SIZE), collate_fn=collate)
    for batch in tqdm(loader, desc=f"training images, {run.metrics['image_attention']}", mininterval=5):
        target = batch["target"]
        labels = torch.empty(len(target), mllm.grid[0] * mllm.grid[1], classes, dtype=torch.double, device=mllm.device)
        for chosen, masks in group_by_mask_size(target):
            view = mllm.geometry.view(tuple(masks.shape[-2:]))
            labels[chosen] = soft_labels(masks.to(mllm.device), classes, mllm.grid, view=view, label_stride=stride)
        yield int(fold_of[batch["index"][0]]), mllm.states(batch["pixels"], sites), labels


def sum_moments(batches: Iterator[Batch]) -> dict[str, PositionMoments]:
    """Return the moments of each site."""
    moments: dict[str, PositionMoments] = {}
    for fold, states, labels in batches:
        if not moments:
            _check_memory(states, labels)
        for site, x in states.items():
            if site not in moments:
                moments[site] = PositionMoments.zeros(x.flatten(0, 1).float().mean(0), FOLDS, *labels.shape[1:])
            moments[site].update(x, labels, fold)
    return moments


def _check_memory(states: dict[str, Tensor], labels: Tensor) -> None:
    """Raise a UserError if the moments and the probes of a fold do not fit into memory."""
    cells, device = labels.shape[1] * labels.shape[2], labels.device
    # For each site f64 sums by fold and a set of probes per shrinkage; at most as much again while they are solved.
    numbers = sum(2 * (FOLDS + len(SHRINKAGES)) * x.shape[-1] * (x.shape[-1] + cells) for x in states.values())
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if 8 * numbers > 0.8 * available:
        raise UserError(
            f"--own-probe needs {8 * numbers / 1e9:.3g} GB for a probe per position at {' and '.join(states)}, but "
            f"{available / 1e9:.3g} GB are available; use a machine with more memory, or leave out --own-probe"
        )


def cross_validate(batches: Iterator[Batch], moments: dict[str, PositionMoments]) -> dict[str, Tensor]:
    """Return the summed losses f64[S, R, T] of each site, every image under the probes of the other folds."""
    losses = {site: [0.0] * len(SHRINKAGES) for site in moments}
    current, forms = None, {}
    for fold, states, labels in batches:
        if fold != current:  # folds come one after the other, so that the probes of one are in memory at a time
            forms, current = {}, fold
            for site, sums in moments.items():
                arguments = *sums.without(fold), sums.pooled.pivot
                forms[site] = [solve_positions(*arguments, shrinkage) for shrinkage in SHRINKAGES]
        for site, x in states.items():
            for i, form in enumerate(forms[site]):
                losses[site][i] += token_losses(form, STRENGTHS, x, labels)
    return {site: torch.stack(values).cpu() for site, values in losses.items()}


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
