"""Results of a long analysis, kept batch by batch: a run that was killed goes on where it stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from llava_bidir.common.atomic_io import write_files
from probes.results.probe_run import read_tensors


def batch_results(
    folder: Path, arguments: dict[str, Any], batches: int, compute: Callable[[int], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """compute(0), ..., compute(batches - 1), each read from `folder` where it lies there and written there where not.

    Args:
        folder: Holds one file a batch, whole or not at all, and what they belong to. The caller removes it when its own
            results are written.
        arguments: All that the results depend on; a folder of others is begun anew.
        batches: How many.
        compute: One of them; must depend on nothing but `arguments`.
    """
    known, arguments = folder / "arguments.json", json.loads(json.dumps(arguments))
    if folder.is_dir() and not (known.is_file() and json.loads(known.read_text()) == arguments):
        shutil.rmtree(folder)
    write_files({known: arguments})
    results = []
    for batch in tqdm(range(batches), desc=folder.stem, mininterval=5):
        path = folder / f"{batch:06d}.safetensors"
        try:
            done = read_tensors(path)
        except (FileNotFoundError, ValueError):  # not computed yet, or damaged since
            write_files({path: compute(batch)})
            done = read_tensors(path)
        results.append(done)
    return results
