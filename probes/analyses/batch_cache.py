"""Results of a long analysis, cached batch by batch so that a killed run resumes after the last finished batch."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.files import write_files
from probes.runs.run_files import read_tensors

Items = TypeVar("Items", bound=Sequence)


def cached_batches(
    folder: Path,
    arguments: dict[str, Any],
    items: Items,
    size: int,
    compute: Callable[[Items], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Return compute(items[:size]), compute(items[size : 2 * size]), ... concatenated; each is kept in `folder`.

    The folder holds one atomically written file per batch; the caller removes it after writing its own results.
    `compute` must depend on nothing but `arguments`; a folder with different arguments is cleared.
    """
    arguments_path = folder / "arguments.json"
    arguments = json.loads(json.dumps(arguments))
    if folder.is_dir() and not (
        arguments_path.is_file() and json.loads(arguments_path.read_text()) == arguments
    ):
        shutil.rmtree(folder)
    write_files({arguments_path: arguments})
    parts: dict[str, list[Tensor]] = {}
    starts = range(0, len(items), size)
    for start in tqdm(starts, desc=folder.stem, mininterval=5):
        path = folder / f"{start // size:06d}.safetensors"
        try:
            result = read_tensors(path)
        except (FileNotFoundError, ValueError):  # not computed yet, or damaged since
            write_files({path: compute(items[start : start + size])})
            result = read_tensors(path)
        for key, value in result.items():
            parts.setdefault(key, []).append(value)
    return {key: torch.cat(values) for key, values in parts.items()}
