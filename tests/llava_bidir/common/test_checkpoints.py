"""Checkpoints are complete or absent after SIGKILL and on a full disk."""

import signal
import subprocess
from pathlib import Path

import processes
import pytest
import small_disks
import tiny_models
import torch
from processes import die

from llava_bidir.cli import main
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
    renamed,
    tmp_path,
    monkeypatch,
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


def test_a_full_disk_in_a_save_leaves_the_checkpoint_before_which_is_resumed(
    parts, conversations, tmp_path
):
    """The disk has room for one checkpoint and a part of the next."""
    words = tiny_models.training_arguments(parts, conversations)
    words += "--data.val_annotations null".split()
    words += "--checkpoints.every_n_steps 1 --trainer.log_every_n_steps 1".split()

    def fit(out: Path, *more: str) -> None:
        main(["fit", *words, "--out", str(out), *more])

    fit(tmp_path / "undisturbed")
    size = (tmp_path / "undisturbed/checkpoints/last.ckpt").stat().st_size
    others = sum(x.stat().st_size for x in (tmp_path / "undisturbed").iterdir() if x.is_file())
    kilobytes = (size * 3 // 2 + others) // 1024
    with small_disks.mounted(tmp_path / "disk", f"size={kilobytes}k") as disk:
        with pytest.raises((OSError, RuntimeError)):
            fit(disk / "run")
        last = torch.load(disk / "run/checkpoints/last.ckpt", weights_only=True)
        assert last["global_step"] == 1
        assert [path.name for path in (disk / "run/checkpoints").iterdir()] == ["last.ckpt"]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        fit(disk / "run", "--ckpt_path", "last")
        for name in ("model.safetensors", "training.json"):
            expected = (tmp_path / "undisturbed/hf" / name).read_bytes()
            assert (disk / "run/hf" / name).read_bytes() == expected
