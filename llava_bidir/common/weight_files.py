"""Files that contain the weights of a checkpoint directory, by transformers' rule.

Other weights in the directory, such as `model_old.safetensors`, are not part of the checkpoint.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .atomic_io import read_json
from .errors import UserError, error_context

INDEX = (
    ".index.json"  # end of the name of a file that lists the files of a checkpoint in several parts
)
# in the order in which transformers looks for them
NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def find_weights(directory: Path) -> Path:
    """Return the file of weights, or the index of several files, that transformers reads in a directory.

    Raises:
        UserError: There is none.
    """
    config = directory / "config.json"
    named = read_json(config).get("transformers_weights") if config.is_file() else None
    names = NAMES if named is None else (str(named),)
    file = next((directory / name for name in names if (directory / name).is_file()), None)
    if file is None:
        raise UserError(f"{directory} contains no weights; expected one of {', '.join(names)}")
    return file


def weight_files(directory: Path) -> list[Path]:
    """Return the files with the weights of a checkpoint: safetensors, or else pickles of tensors.

    Raises:
        UserError: There are none, or the index is damaged or names a file that does not exist.
    """
    file = find_weights(directory)
    if not file.name.endswith(INDEX):
        return [file]
    parts = read_json(file).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise UserError(f"{file}: expected weight_map, an object of file names by tensor")
    files = sorted({directory / name for name in parts.values()})
    for part in files:
        if not part.is_file():
            raise UserError(
                f"{file} names {part.name}, which does not exist; download the checkpoint again"
            )
    return files


def read_tensors(directory: Path, part: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint directory whose names contain `part`; the others are not read.

    Raises:
        UserError: The directory has no weights, or a weight file is damaged.
    """
    matches = {}
    for file in weight_files(directory):
        with error_context(file):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    matches |= {
                        name: tensors.get_tensor(name) for name in tensors.keys() if part in name
                    }
            else:
                tensors = torch.load(
                    file,
                    map_location="cpu",
                    mmap=True,
                    weights_only=True,
                )
                matches |= {name: tensor for name, tensor in tensors.items() if part in name}
    return matches
