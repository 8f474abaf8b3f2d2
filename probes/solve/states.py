"""The states of all training images at a group of sites, from which the probes of these sites are solved.

As many sites as fit into memory are read together, in a forward over the images that stops after the last of them. If
one site alone does not fit, its states are in a file that is mapped into memory: the same tensor, and so the same
probes to the last bit.

Legend: N training images, T tokens, d width.
"""

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_bidir.common.files import names_full_disk
from probes.compute.machine import Machine, solver_device
from probes.data.batches import MaskPreparer, PreprocessedDataset
from probes.data.probe_data import ProbeData
from probes.ops.normal_equations import NormalEquations, join_equations, normal_equations
from probes.ops.quadrature import PreparedMasks, join_masks
from probes.site_probes import SiteProbes
from probes.steps.progress import follow

from .held_out import scored_masks
from .least_squares import check_values
from .objective import NODES


@dataclass(frozen=True)
class Targets:
    """What the probes of all sites predict, prepared once, on the device of the solver.

    Args:
        prepared: Masks of classes, or normal equations of values, of the N images.
        scored: Masks by which folds are tested, see `held_out.py`; None for the same.
        fold_of: i64[N], fold of each image.
    """

    prepared: PreparedMasks | NormalEquations
    scored: PreparedMasks | None
    fold_of: Tensor


def target_bytes(probes: SiteProbes) -> int:
    """Return the bytes of the prepared target of an image."""
    grid = probes.mllm.grid
    tokens = math.prod(grid)
    if probes.task.loss is None:
        return 8 * tokens * (5 + probes.channels)  # four diagonals and the weight; channels
    nodes = math.prod(2 + NODES * (side - 1) for side in grid)
    return 4 * (tokens * probes.channels + nodes)


def site_groups(
    probes: SiteProbes, sites: Sequence[str], images: int, memory: float
) -> list[tuple[list[str], int]]:
    """Return sites in groups whose states fit into memory together, with their bytes; each group has one at least.

    Args:
        probes: The model.
        sites: Names of sites, in the order of the forward.
        images: N.
        memory: Bytes.
    """
    groups: list[tuple[list[str], int]] = []
    for site in sites:
        size = images * probes.mllm.state_bytes([site])
        if not groups or groups[-1][1] + size > memory:
            groups.append(([], 0))
        group, before = groups[-1]
        groups[-1] = ([*group, site], before + size)
    return groups


def read(
    probes: SiteProbes,
    data: ProbeData,
    machine: Machine,
    sites: Sequence[str],
    fold_of: Tensor,
    folder: Path | None = None,
    targets: Targets | None = None,
) -> tuple[dict[str, Tensor], Targets]:
    """Return the states f[N, T, d] of all training images by site, on the CPU, and the targets.

    Args:
        probes: Model and task.
        data: Images and targets.
        machine: Where the model runs, and how progress is shown.
        sites: Names of sites.
        fold_of: i64[N], fold of each image.
        folder: Where states are in files; None for memory.
        targets: Of the images, if an earlier group has prepared them.

    Raises:
        UserError: The disk has no place for the states, or the targets of some folds cannot be solved.
    """
    prepare = None
    if probes.task.loss is not None:
        prepare = MaskPreparer(probes.mllm.geometry, probes.channels, NODES)
    training = data.splits["training"]
    loaded = PreprocessedDataset(
        training, probes.mllm.preprocess, prepare if targets is None else None
    )
    images = len(fold_of)
    batches = [part.tolist() for part in torch.arange(images).split(data.rank_batch_size)]
    states: dict[str, Tensor] = {}
    device = solver_device(machine.device)
    label = f"states of {len(sites)} sites"

    def read_batches() -> Iterator[dict[str, Any]]:
        for batch in follow(
            data.loader(loaded, batches), count=len(batches), label=label, kind=machine.progress
        ):
            batch = move_batch(batch, device)
            with machine.forward_context():
                found = probes.states(batch, sites)
            index = batch["index"].cpu()
            for site, x in found.items():
                if site not in states:
                    states[site] = new_states((images, *x.shape[1:]), x.dtype, folder)
                states[site][index] = x.cpu()
            yield batch

    if targets is not None:
        for _ in read_batches():
            pass
    elif prepare:
        masks = join_masks((batch["masks"] for batch in read_batches()), images)
        scored = scored_masks(
            masks,
            fold_of=fold_of,
            target_of=lambda image: torch.from_numpy(training[image]["target"]),
            prepare=prepare,
        )
        targets = Targets(masks, scored, fold_of)
    else:
        parts = [
            prepare_values(probes, target) for batch in read_batches() for target in batch["target"]
        ]
        targets = Targets(join_equations(parts), None, fold_of)
        check_values(targets.prepared, fold_of)
    return states, targets


def prepare_values(probes: SiteProbes, target: Tensor) -> NormalEquations:
    """Return the normal equations of the target f[H, W, ...] of an image."""
    mllm = probes.mllm
    view = mllm.geometry.view(tuple(target.shape[:2]))
    return normal_equations(probes.task.values(target[None]), mllm.grid, view)


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors, lists of tensors, and masks on a device."""

    def move(x: Any) -> Any:
        if isinstance(x, list):
            return [move(item) for item in x]
        return x.to(device) if isinstance(x, Tensor | PreparedMasks) else x

    return {name: move(x) for name, x in batch.items()}


def new_states(shape: Sequence[int], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Return a tensor of any content: in memory, or in a file of a folder that is mapped into memory.

    The file has no name: it is gone when the process ends, even when it is killed.

    Raises:
        UserError: The disk has no place for it.
    """
    if folder is None:
        return torch.empty(*shape, dtype=dtype)
    numbers = math.prod(shape)
    size = numbers * dtype.itemsize
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        need = f"a site takes {size / 1e9:.3g} GB, more than --memory-gb"
        with names_full_disk(folder, f"{need}; choose another --out, or fewer images"):
            if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
                os.posix_fallocate(file.fileno(), 0, size)
        return torch.from_file(file.name, shared=True, size=numbers, dtype=dtype).view(*shape)
