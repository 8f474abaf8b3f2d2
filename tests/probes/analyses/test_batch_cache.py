"""Cached batches of a killed analysis."""

import os

import torch

from probes.analyses.batch_cache import cached_batches


def test_only_missing_or_damaged_batches_are_computed_again(tmp_path):
    computed = []
    folder = tmp_path / "x.partial"

    def compute(items: str) -> dict[str, torch.Tensor]:
        computed.append(items)
        return {"x": torch.full((100,), len(computed))}

    first = cached_batches(folder, {"seed": 0}, "abcdefg", 2, compute)
    (folder / "000001.safetensors").unlink()
    os.truncate(folder / "000002.safetensors", 200)
    computed.clear()
    again = cached_batches(folder, {"seed": 0}, "abcdefg", 2, compute)
    assert computed == ["cd", "ef"]
    assert first["x"][::100].tolist() == [1, 2, 3, 4]
    assert again["x"][::100].tolist() == [1, 1, 2, 4]
    computed.clear()
    cached_batches(folder, {"seed": 1}, "abcdefg", 2, compute)
    assert computed == ["ab", "cd", "ef", "g"], "different arguments"
