"""Save a checkpoint that is a single file atomically, and load it without executing code."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from .atomic_io import atomic_write
from .errors import UserError, error_context


class AtomicCheckpointIO(TorchCheckpointIO):
    """Single-file checkpoints, written under a temporary name in their folder and then renamed.

    Lightning's own plugin writes to memory, then to /tmp, and moves the file across file systems.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str, storage_options: Any = None
    ) -> None:
        """Write `checkpoint` to `path`."""
        with atomic_write(Path(path)) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str,
        *args: Any,
        mmap: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the checkpoint at `path`; pickled code is rejected, not executed.

        Args:
            path: Its file.
            *args, **kwargs: Lightning's, which change nothing.
            mmap: Read a tensor only when it is used.

        Raises:
            UserError: The file cannot be loaded as plain data, or is a checkpoint of a run with ZeRO.
        """
        if Path(path).is_dir():
            raise UserError(
                f"checkpoint {path} is a directory, from a run with ZeRO; add the run's configs/cluster/zero*.yaml"
            )
        with error_context(f"checkpoint {path}"):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
