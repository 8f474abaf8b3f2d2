"""Which checkpoint a run goes on from when some are damaged."""

import os
from pathlib import Path

import pytest
import torch

from probes.resume import checkpoint_of, is_whole, newest_whole


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def cut_last_byte(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    """In the middle of the tensor."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [cut, cut_last_byte, empty, flip_a_bit]


@pytest.fixture
def checkpoints(tmp_path) -> list[Path]:
    """The newest last."""
    paths = [tmp_path / f"{name}.ckpt" for name in ("epoch=1", "epoch=2", "last")]
    for age, path in enumerate(paths):
        torch.save({"x": torch.rand(10_000)}, path)
        os.utime(path, (age, age))
    return paths


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over_and_named(damage, checkpoints, caplog):
    assert newest_whole(checkpoints[0].parent) == checkpoints[-1] and not caplog.text
    times = checkpoints[-1].stat().st_mtime_ns
    damage(checkpoints[-1])
    os.utime(checkpoints[-1], ns=(times, times))
    assert not is_whole(checkpoints[-1])
    assert checkpoint_of("last", checkpoints[0].parent) == checkpoints[1]
    assert f"{checkpoints[-1]} is damaged" in caplog.text
    with pytest.raises(ValueError, match=rf"last.ckpt is damaged; the newest whole one .* is {checkpoints[1]}"):
        checkpoint_of(str(checkpoints[-1]), checkpoints[0].parent)


def test_without_a_whole_one_there_is_none(checkpoints, tmp_path):
    for path in checkpoints:
        cut(path)
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="nothing.ckpt is not there"):
        checkpoint_of(str(tmp_path / "nothing.ckpt"), tmp_path)
    assert checkpoint_of(None, tmp_path) is None
