"""The states of a process's images in a file, so that later passes need no forward.

Legend: B images of a batch, T tokens, d width.
"""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava_bidir.common.errors import UserError


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
