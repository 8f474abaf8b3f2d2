"""Checkpoints are complete or absent after SIGKILL and on a full disk; test_resume.py resumes them."""

import signal
from pathlib import Path

import processes
import pytest
import small_disks
import tiny_models
import torch
from processes import die

from llava_bidir.common.checkpoints import AtomicCheckpointIO
from llava_bidir.common.files import commit_directory
from llava_bidir.common.runs import find_checkpoint, last_checkpoint


def save_folder(path: Path, content: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True)
    (partial / "share").write_text(content)
    commit_directory(path)
    return path


@pytest.mark.parametrize("renamed", [0, 1])
def test_sigkill_during_the_renames_of_a_folder_leaves_the_one_before(
    renamed, tmp_path, monkeypatch
):
    path = save_folder(tmp_path / "last.ckpt", "old")
    rename = Path.rename
    names = (path.name, "last.ckpt.partial")
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: die() if self.name == names[renamed] else rename(self, target),
    )
    assert processes.wait(processes.fork(lambda: save_folder(path, "new"))) == -signal.SIGKILL
    last = last_checkpoint(tmp_path)
    assert last == (path if renamed == 0 else tmp_path / "last.ckpt.old")
    assert (last / "share").read_text() == "old"


def test_a_kill_before_the_old_folder_is_deleted_leaves_the_new_one(tmp_path):
    save_folder(tmp_path / "last.ckpt.old", "old")
    path = save_folder(tmp_path / "last.ckpt", "new")
    assert last_checkpoint(tmp_path) == path
    save_folder(tmp_path / "last.ckpt.old", "old")  # which the save has deleted
    assert last_checkpoint(tmp_path) == path


def test_a_folder_is_replaced(tmp_path):
    save_folder(tmp_path / "last.ckpt", "old")
    save_folder(tmp_path / "last.ckpt", "new")
    assert (last_checkpoint(tmp_path) / "share").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_is_not_there_is_an_error_unless_it_is_the_last(tmp_path):
    assert find_checkpoint("last", tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match="there is no checkpoint .*none.ckpt"):
        find_checkpoint(str(tmp_path / "none.ckpt"), tmp_path)


def test_a_truncated_checkpoint_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(torch.zeros(1000), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint .*last.ckpt: "):
        AtomicCheckpointIO().load_checkpoint(str(path))


def test_a_full_disk_in_a_save_leaves_the_checkpoint_before(parts, conversations, tmp_path):
    """The disk has room for one checkpoint and a part of the next."""
    more = "--data.val_annotations null --checkpoints.every_n_steps 1".split()
    whole = tiny_models.fit(parts, conversations, tmp_path / "whole", *more)
    size = (whole / "checkpoints/last.ckpt").stat().st_size
    others = sum(file.stat().st_size for file in whole.iterdir() if file.is_file())
    kilobytes = (size * 3 // 2 + others) // 1024
    with small_disks.mounted(tmp_path / "disk", f"size={kilobytes}k") as disk:
        with pytest.raises(SystemExit, match="cannot write .*last.ckpt: No space left on device"):
            tiny_models.fit(parts, conversations, disk / "run", *more)
        last = torch.load(disk / "run/checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == 1
        assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["last.ckpt"]
