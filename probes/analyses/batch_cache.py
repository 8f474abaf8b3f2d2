"""Results of a long analysis, cached batch by batch so that a killed run resumes after the last finished batch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.atomic_io import write_files
from probes.results.probe_run import read_tensors


def cached_batches(
    folder: Path, arguments: dict[str, Any], batches: int, compute: Callable[[int], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """Return compute(0), ..., compute(batches - 1), read from `folder` or computed and written there.

    The folder holds one atomically written file per batch; the caller removes it after writing its own results.
    `compute` must depend on nothing but `arguments`; a folder with different arguments is cleared.
    """
    arguments_path, arguments = folder / "arguments.json", json.loads(json.dumps(arguments))
    if folder.is_dir() and not (arguments_path.is_file() and json.loads(arguments_path.read_text()) == arguments):
        shutil.rmtree(folder)
    write_files({arguments_path: arguments})
    results = []
    for batch in tqdm(range(batches), desc=folder.stem, mininterval=5):
        path = folder / f"{batch:06d}.safetensors"
        try:
            result = read_tensors(path)
        except (FileNotFoundError, ValueError):  # not computed yet, or damaged since
            write_files({path: compute(batch)})
            result = read_tensors(path)
        results.append(result)
    return results
