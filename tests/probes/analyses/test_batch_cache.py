"""Cached batches of a killed analysis."""

import os

import torch

from probes.analyses.batch_cache import cached_batches


def test_only_missing_or_damaged_batches_are_computed_again(tmp_path):
    computed, folder = [], tmp_path / "x.partial"

    def compute(batch: int) -> dict[str, torch.Tensor]:
        computed.append(batch)
        return {"x": torch.full((100,), batch)}

    first = cached_batches(folder, {"seed": 0}, 4, compute)
    (folder / "000001.safetensors").unlink()
    os.truncate(folder / "000002.safetensors", 200)
    computed.clear()
    again = cached_batches(folder, {"seed": 0}, 4, compute)
    assert computed == [1, 2] and [b["x"][0].item() for b in again] == [0, 1, 2, 3] == [b["x"][0] for b in first]
    computed.clear()
    cached_batches(folder, {"seed": 1}, 4, compute)
    assert computed == [0, 1, 2, 3], "different arguments"
