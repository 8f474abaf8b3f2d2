"""Batches of a killed analysis, and what it leaves."""

import os
from dataclasses import dataclass

import torch

from probes.analyses.base import Analysis, RunOptions


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Options.

    Args:
        seed: A seed.
    """

    seed: int = 0


ANALYSIS = Analysis(
    "letters",
    "Which letters?",
    options=Options,
)


def test_only_missing_or_damaged_batches_are_computed_again(runs, tmp_path):
    run = runs["causal"]
    computed = []
    folder = tmp_path / "letters.partial"

    def compute(items: str) -> dict[str, torch.Tensor]:
        computed.append(items)
        return {"x": torch.full((100,), len(computed))}

    def batches(seed: int) -> list[int]:
        computed.clear()
        options = Options(probes=run.path, out=tmp_path, seed=seed)
        return ANALYSIS.in_batches(run, options, "abcdefg", 2, compute)["x"][::100].tolist()

    assert batches(0) == [1, 2, 3, 4]
    (folder / "000001.safetensors").unlink()
    os.truncate(folder / "000002.safetensors", 200)
    assert batches(0) == [1, 1, 2, 4]
    assert computed == ["cd", "ef"]
    batches(1)
    assert computed == ["ab", "cd", "ef", "g"], "other options"
