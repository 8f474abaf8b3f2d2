"""Batches of images with the states of a frozen MLLM, on the device of the solver, in several passes.

With `StateFile`, passes after the first one need no forward.

Legend: B images of a batch, T tokens, d width.
"""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_bidir.common.errors import UserError
from llava_bidir.common.processes import rank, rank_count
from probes.data.batches import MaskPreparer
from probes.data.probe_data import ProbeData
from probes.machine import Machine, solver_device
from probes.ops.quadrature import PreparedMasks
from probes.site_probes import SiteProbes
from probes.step_progress import format_duration, tell

from .objective import TIGHT_NODES

log = logging.getLogger(__name__)

BAR_S = 5.0  # between two drawings of a bar
LINE_S = 10.0  # between two lines of a log

Item = TypeVar("Item")


class StateReader:
    """Reads images and runs the frozen model on them.

    Args:
        probes: Model and sites.
        data: Images and targets.
        machine: Says device and precision, and how progress is shown.
        masks: Prepare the masks of training images for the loss, as "masks" of a batch.
    """

    def __init__(
        self,
        probes: SiteProbes,
        data: ProbeData,
        machine: Machine,
        masks: bool,
    ):
        self.probes = probes
        self.data = data
        self.machine = machine
        self.device = solver_device(machine.device)
        mllm = probes.mllm
        self.prepare_masks = MaskPreparer(mllm.geometry, probes.channels, TIGHT_NODES)
        data.read_for(mllm, probes.sites, self.prepare_masks if masks else None)
        self.state_file: StateFile | None = None

    def share(self, images: Iterable[int]) -> list[list[int]]:
        """Return this process's share of images, in batches."""
        mine = list(images)[rank() :: rank_count()]
        size = self.data.rank_batch_size
        return [mine[i : i + size] for i in range(0, len(mine), size)]

    def keep_states(self, folder: Path, images: list[int]) -> None:
        """Write states to a file when they are first computed, and read them from there after that.

        Args:
            folder: On the disk that is used.
            images: Indices of this process's training images.
        """
        self.state_file = StateFile(folder, images)

    def training(self, batches: list[list[int]], label: str) -> Iterator[dict[str, Any]]:
        """Yield batches of training images with their "states"; the progress bar shows `label`."""
        loader = self.data.training_loader(batches)
        for batch in self._progress(loader, label):
            batch = move_batch(batch, self.device)
            yield batch | {"states": self._states(batch)}

    def _states(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return the states f[B, T, d] of a batch of training images by site."""
        images = batch["index"].tolist()
        file = self.state_file
        if file is not None and file.has(images):
            return file.read(images, self.device)
        with self.precision():
            states = self.states(batch)
        if file is not None:
            file.write(images, states)
        return states

    def states(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return what the model says of a batch, f[B, T, d] by site."""
        return {site: x.to(self.device) for site, x in self.probes.states(batch).items()}

    def training_target(self, image: int) -> Tensor:
        """Return the mask uint8[H, W] of a training image."""
        return torch.from_numpy(self.data.splits["training"][image]["target"])

    def validation(self) -> Iterator[dict[str, Any]]:
        """Yield this process's batches of validation images."""
        for batch in self._progress(self.data.validation_loader(), "scores"):
            yield move_batch(batch, self.device)

    def precision(self) -> AbstractContextManager:
        """Return the context of a forward at the precision of the run."""
        return self.machine.forward_context()

    def _progress(self, loader: DataLoader, label: str) -> Iterable:
        """Show a bar on the first process, or lines of a log where no terminal shows a bar."""
        count = len(loader)
        if self.machine.progress == "lines" and rank() == 0:
            return follow(log_pass(loader), count, label, hidden=True)
        return follow(loader, count, label, hidden=rank() > 0 or self.machine.progress != "bar")


def follow(
    items: Iterable[Item],
    count: int,
    label: str,
    hidden: bool,
) -> Iterator[Item]:
    """Yield so many items, show a bar unless it is hidden, and tell who watches the step."""
    with tqdm(
        total=count,
        desc=label,
        disable=hidden,
        mininterval=BAR_S,
    ) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.set_postfix_str(tell(label, done, count), refresh=False)
            bar.update()


def log_pass(batches: Sized) -> Iterator:
    """Yield batches of a pass; log some of them, with the rate and the time left."""
    started = last = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.monotonic()
        if now - last >= LINE_S or done == len(batches):
            last = now
            rate = done / max(now - started, 1e-9)
            left = format_duration((len(batches) - done) / rate)
            log.info(f"batch {done}/{len(batches)} of a pass, {rate:.3g} batches/s, {left} left")


def move_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors, lists of tensors, and masks on a device."""

    def move(x: Any) -> Any:
        if isinstance(x, list):
            return [move(item) for item in x]
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True)
        return x.to(device) if isinstance(x, PreparedMasks) else x

    return {name: move(x) for name, x in batch.items()}


class StateFile:
    """States of images at some sites, as the model has given them, to the last bit.

    The file has no name: it is gone when the process ends, even when it is killed. Its place on the disk is reserved
    when the first batch comes, so that a full disk is an error at the start and not later.

    Args:
        folder: On the disk that is used.
        images: Indices of the images of this process; others are not written.
    """

    def __init__(self, folder: Path, images: list[int]):
        self.folder = folder
        self.slots = {image: slot for slot, image in enumerate(images)}  # where each is in the file
        self.written: set[int] = set()
        self.kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}  # (T, d) and dtype of each site
        self.rows = np.empty((0, 0), np.uint8)

    def has(self, images: list[int]) -> bool:
        """Return whether the states of all of these images have been written."""
        return self.written.issuperset(images)

    def write(self, images: list[int], states: dict[str, Tensor]) -> None:
        """Write the states f[B, T, d] of B images by site, as far as they are this process's own.

        Raises:
            UserError: The disk has no place for all images.
        """
        if not self.slots:
            return
        if not self.kinds:
            self._reserve(states)
        bytes_of = [x.cpu().contiguous().flatten(1).view(torch.uint8) for x in states.values()]
        for image, row in zip(images, torch.cat(bytes_of, 1), strict=True):
            if image in self.slots:
                self.rows[self.slots[image]] = row.numpy()
                self.written.add(image)

    def read(self, images: list[int], device: torch.device) -> dict[str, Tensor]:
        """Return the states f[B, T, d] of B images by site, which have been written."""
        rows = torch.from_numpy(self.rows[[self.slots[image] for image in images]])
        parts = zip(self.kinds.items(), rows.split(self._sizes(), 1), strict=True)
        return {
            site: part.contiguous().view(dtype).unflatten(1, shape).to(device)
            for (site, (shape, dtype)), part in parts
        }

    def _sizes(self) -> list[int]:
        """Return the bytes of an image at each site."""
        return [shape.numel() * dtype.itemsize for shape, dtype in self.kinds.values()]

    def _reserve(self, states: dict[str, Tensor]) -> None:
        """Make the file, for images with such states."""
        self.kinds = {site: (x.shape[1:], x.dtype) for site, x in states.items()}
        image_bytes = sum(self._sizes())
        size = len(self.slots) * image_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:  # macOS
                    file.truncate(size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                raise UserError(
                    f"the states of {len(self.slots):,} images take {size / 1e9:.3g} GB, which the disk of "
                    f"{self.folder} does not have; choose fewer --model.sites, another --out, or leave out --disk-gb"
                ) from error
            self.rows = np.memmap(file, np.uint8, "r+", shape=(len(self.slots), image_bytes))
