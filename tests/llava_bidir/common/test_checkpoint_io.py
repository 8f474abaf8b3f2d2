"""Checkpoints are complete or absent after SIGKILL and on a full disk; `last` is the latest valid one."""

import logging
import os
import signal

import processes
import pytest
import torch
from processes import die

from llava_bidir.common.checkpoints import AtomicCheckpointIO
from llava_bidir.common.runs import (
    commit_checkpoint_directory,
    find_defect,
    latest_valid_checkpoint,
    read_manifest,
    resolve_ckpt_path,
)

OLD = {"weight": torch.zeros(3000)}
NEW = {"weight": torch.ones(3000)}


def save(path, what=OLD):
    AtomicCheckpointIO().save_checkpoint(what, str(path))
    return path


def save_directory(
    path, files=("checkpoint/share_0.pt", "checkpoint/share_1.pt"), interrupt=lambda: None
):
    partial = path.with_name(path.name + ".partial")
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(NEW, partial / name)
    interrupt()
    commit_checkpoint_directory(path, {"world_size": 2})
    return path


@pytest.mark.parametrize("moment", ["written", "renamed", "replaced"])
def test_sigkill_during_the_renames_leaves_a_valid_directory(moment, tmp_path, monkeypatch):
    path = save_directory(tmp_path / "last.ckpt")
    if moment == "renamed":
        monkeypatch.setattr("pathlib.Path.rename", lambda source, target: die())
    if moment == "replaced":  # between the two renames
        rename = type(path).rename
        monkeypatch.setattr(
            "pathlib.Path.rename",
            lambda s, target: die() if s.name.endswith(".partial") else rename(s, target),
        )
    child = processes.fork(
        lambda: save_directory(path, interrupt=die if moment == "written" else lambda: None)
    )
    assert processes.wait(child) == -signal.SIGKILL
    whole = latest_valid_checkpoint(tmp_path)
    assert whole == (tmp_path / "last.ckpt.replaced" if moment == "replaced" else path)
    assert read_manifest(whole)["world_size"] == 2


def test_last_is_the_latest_valid_checkpoint_and_logs_skipped_ones(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    paths = [save(folder / "1.ckpt"), save_directory(folder / "2.ckpt"), save(folder / "3.ckpt")]
    paths += [save_directory(folder / "4.ckpt")]
    paths[2].write_bytes(paths[2].read_bytes()[:-100])
    (paths[3] / "whole.json").unlink()
    for second, path in enumerate(paths):
        os.utime(path, (second, second))
    (folder / "5.ckpt.partial").mkdir()
    with caplog.at_level(logging.INFO):
        assert resolve_ckpt_path("last", folder) == str(paths[1])
    passed = [record.getMessage() for record in caplog.records if "skipping" in record.getMessage()]
    assert [str(path) in text for path, text in zip(paths[3:1:-1], passed, strict=True)] == [
        True
    ] * 2
    assert "no whole.json" in passed[0]
    assert "truncated" in passed[1]


def test_a_damaged_checkpoint_is_an_error_that_proposes_another(tmp_path):
    good = save(tmp_path / "good.ckpt")
    bad = save(tmp_path / "bad.ckpt")
    bad.write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"bad.ckpt: the file is truncated.*The latest valid checkpoint in .*good.ckpt",
    ):
        resolve_ckpt_path(str(bad), tmp_path)
    assert resolve_ckpt_path(str(good), tmp_path) == str(good)
    assert resolve_ckpt_path(None, tmp_path) is None
    assert find_defect(tmp_path / "none.ckpt") == "no such file or directory"
    assert resolve_ckpt_path("last", tmp_path / "nowhere") is None


def test_zero_checkpoint_without_zero_is_an_error(tmp_path):
    with pytest.raises(
        ValueError, match="is a directory, from a run with ZeRO; add the run.s configs/cluster/zero"
    ):
        AtomicCheckpointIO().load_checkpoint(str(save_directory(tmp_path / "zero.ckpt")))
