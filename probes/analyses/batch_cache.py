"""Results of a long analysis, cached batch by batch so that a killed run resumes after the last finished batch."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.atomic_io import write_files
from probes.results.run_files import read_tensors

Items = TypeVar("Items", bound=Sequence)


def cached_batches(
    folder: Path,
    arguments: dict[str, Any],
    items: Items,
    size: int,
    compute: Callable[[Items], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Return compute(items[:size]), compute(items[size : 2 * size]), ..., read from `folder` or written there.

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
    results = []
    for start in tqdm(range(0, len(items), size), desc=folder.stem, mininterval=5):
        path = folder / f"{start // size:06d}.safetensors"
        try:
            result = read_tensors(path)
        except (FileNotFoundError, ValueError):  # not computed yet, or damaged since
            write_files({path: compute(items[start : start + size])})
            result = read_tensors(path)
        results.append(result)
    return results
