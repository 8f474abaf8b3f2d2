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
from llava_bidir.common.imports import check_shape
from probes.compute.machine import Machine, solver_device
from probes.data.batches import MaskPreparer, ProbeBatch
from probes.data.probe_data import ProbeData
from probes.data.windows import TrainingSamples
from probes.ops.geometry import Geometry
from probes.ops.normal_equations import NormalEquations, join_equations, normal_equations
from probes.ops.quadrature import PreparedMasks, join_masks
from probes.site_probes import SiteProbes
from probes.steps.progress import follow
from probes.tasks import Task

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
        numbers_of_token = 5 + probes.channels  # four diagonals and the weight; channels
        return 8 * tokens * numbers_of_token
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
        last_group: list[str] = []
        last_size = 0
        if groups:
            last_group, last_size = groups[-1]
        if last_group and last_size + size <= memory:
            groups[-1] = ([*last_group, site], last_size + size)
        else:
            groups.append(([site], size))
    return groups


class StateReader:
    """Reads the states of the training images group by group of sites, and prepares the targets of these images once.

    Args:
        probes: Model and task.
        data: Images and targets.
        samples: The training images as the model sees them.
        machine: Where the model runs, and how progress is shown.
        fold_of: i64[N], fold of each of them.

    Attributes:
        targets: Of the images, from the first reading on.
    """

    def __init__(
        self,
        probes: SiteProbes,
        data: ProbeData,
        samples: TrainingSamples,
        machine: Machine,
        fold_of: Tensor,
    ):
        self.probes = probes
        self.data = data
        self.samples = samples
        self.machine = machine
        self.fold_of = fold_of
        self.prepare: MaskPreparer | None = None
        if probes.task.loss is not None:
            self.prepare = MaskPreparer(samples.geometry, probes.channels, NODES)
        self.targets: Targets | None = None

    def read(self, sites: Sequence[str], folder: Path | None = None) -> dict[str, Tensor]:
        """Return the states f[N, T, d] of all training images by site, on the CPU.

        Args:
            sites: Names of sites.
            folder: Where states are in files; None for memory.

        Raises:
            UserError: The disk has no place for the states, or the targets of some folds cannot be solved.
        """
        states: dict[str, Tensor] = {}
        batches = self._read_batches(sites, states=states, folder=folder)
        if self.targets is None:
            self.targets = self._prepare_targets(batches)
        else:
            for _ in batches:
                pass
        return states

    def _read_batches(
        self, sites: Sequence[str], states: dict[str, Tensor], folder: Path | None
    ) -> Iterator[ProbeBatch]:
        """Yield batches on the device of the solver, whose states are then in `states`."""
        prepare = None
        if self.targets is None:
            prepare = self.prepare
        source = self.data.read_images(self.samples, self.samples.preprocess, prepare)
        images = len(self.fold_of)
        batches = [part.tolist() for part in torch.arange(images).split(self.data.rank_batch_size)]
        for batch in follow(
            self.data.loader(source, batches),
            count=len(batches),
            label=f"states of {len(sites)} sites",
            kind=self.machine.progress,
        ):
            batch = move_batch(batch, solver_device(self.machine.device))
            with self.machine.forward_context():
                batch_states = self.probes.states(batch, sites)
            index = batch["index"].cpu()
            for site, site_states in batch_states.items():
                if site not in states:
                    shape = (images, *site_states.shape[1:])
                    states[site] = new_states(shape, dtype=site_states.dtype, folder=folder)
                states[site][index] = site_states.cpu()
            yield batch

    def _prepare_targets(self, batches: Iterator[ProbeBatch]) -> Targets:
        if self.prepare is None:
            equations = []
            probes = self.probes
            geometry = self.samples.geometry
            for batch in batches:
                for target in batch["target"]:
                    values = prepare_values(target, probes.task, probes.channels, geometry)
                    equations.append(values)
            joined = join_equations(equations)
            check_values(joined, self.fold_of)
            return Targets(joined, scored=None, fold_of=self.fold_of)
        masks = join_masks((batch["masks"] for batch in batches), len(self.fold_of))
        return self.mask_targets(masks, self.fold_of, range(len(self.fold_of)))

    def mask_targets(self, masks: PreparedMasks, fold_of: Tensor, images: Sequence[int]) -> Targets:
        """Return the masks of some of the training images, in these folds, with those by which folds are tested."""
        scored = scored_masks(
            masks,
            fold_of=fold_of,
            target_of=lambda i: torch.from_numpy(self.samples[images[i]]["target"]),
            prepare=self.prepare,
        )
        return Targets(masks, scored=scored, fold_of=fold_of)


def prepare_values(
    target: Tensor, task: Task, channels: int, geometry: Geometry
) -> NormalEquations:
    """Return the normal equations of the target f[H, W, ...] of an image."""
    height, width = target.shape[:2]
    values = task.values(target[None])
    check_shape(task.values, values, (1, height, width, channels))
    return normal_equations(values, grid=geometry.grid, view=geometry.view((height, width)))


def move_batch(batch: ProbeBatch, device: torch.device) -> ProbeBatch:
    """Return a batch with its tensors, lists of tensors, and masks on a device."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if isinstance(value, Tensor | PreparedMasks):
            return value.to(device)
        return value

    return {name: move(value) for name, value in batch.items()}


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
