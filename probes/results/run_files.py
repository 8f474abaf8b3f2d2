"""Tensors of a run and of its analyses; files of a run that have changed since it wrote them."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llava_bidir.common.atomic_io import sha256
from llava_bidir.common.errors import UserError
from llava_bidir.common.model_outputs import DTYPE_ADVICE


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: If the file is damaged; the message names it.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); make it again") from None


def check_hash(path: Path, hashes: dict[str, str] | None) -> None:
    """Raise a UserError if a file is not the one that its run wrote.

    Args:
        path: A file that exists.
        hashes: "files" of manifest.json; None in runs of earlier versions, which are not checked.
    """
    if hashes is not None and hashes.get(path.name) != sha256(path):
        raise UserError(
            f"{path} is not the file that the run wrote: its SHA-256 is not the one in manifest.json; restore the file "
            "or make the run again"
        )


def check_finite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raise a UserError that names `path` and the tensor if a weight is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{path}: {name} is not finite; make the run again, in another dtype or with a lower learning rate: "
                f"{DTYPE_ADVICE}"
            )
