"""Files and folders are complete or absent: after a kill at any moment, on a full disk, on a read-only disk."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import processes
import pytest
import small_disks
import torch
from processes import die
from safetensors.torch import load_file, save_file

from llava_bidir.common import files
from llava_bidir.common.checkpoints import AtomicCheckpointIO
from llava_bidir.common.files import atomic_directory, atomic_write, write_files
from llava_bidir.common.runs import (
    find_defect,
    latest_valid_checkpoint,
)
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.export import export_hf


def write_file(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text)


def write_directory(path: Path, text: str) -> None:
    with atomic_directory(path, "file") as partial:
        (partial / "file").write_text(text)


@pytest.mark.parametrize(
    ("write", "result", "moment"),
    [
        (write_file, "path", "pathlib.Path.replace"),
        (write_directory, "path/file", "pathlib.Path.rename"),
    ],
)
def test_a_kill_before_the_rename_leaves_the_old_version(
    write,
    result,
    moment,
    tmp_path,
    monkeypatch,
):
    write(tmp_path / "path", "old")

    def write_and_die():
        monkeypatch.setattr(moment, die)
        write(tmp_path / "path", "new")

    assert processes.wait(processes.fork(write_and_die)) == -signal.SIGKILL
    assert (tmp_path / result).read_text() == "old"
    write(tmp_path / "path", "new")
    assert (tmp_path / result).read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["path"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_permissions_of_other_new_files(
    umask,
    mode,
    parts,
    tmp_path,
):
    """safetensors writes 0600, which a group cannot read."""
    before = os.umask(umask)
    try:
        write_files({tmp_path / "a.safetensors": {"x": torch.zeros(1)}, tmp_path / "a.json": {}})
        with atomic_write(tmp_path / "b.safetensors") as partial:
            save_file({"x": torch.zeros(1)}, partial)
        processor = build_processor(*parts)
        export_hf(build_model(*parts, processor), processor, tmp_path / "hf")
    finally:
        os.umask(before)
    files = [
        path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")
    ]
    assert tmp_path / "hf/model.safetensors" in files
    assert {path.name for path in files if path.stat().st_mode & 0o777 != mode} == set()


@pytest.mark.parametrize("existing", ["folder/thesis.txt", "folder/file/thesis.txt", "folder"])
def test_a_foreign_folder_is_not_replaced(existing, tmp_path):
    """`llava-bidir export CKPT ~` must not delete a home."""
    (tmp_path / existing).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / existing).write_text("four years")
    with pytest.raises(
        ValueError, match="folder exists and contains no file, so it is not replaced"
    ):
        write_directory(tmp_path / "folder", "new")
    assert (tmp_path / existing).read_text() == "four years"
    (tmp_path / "empty").mkdir()
    write_directory(tmp_path / "empty", "new")
    assert (tmp_path / "empty/file").is_file()


# ------------------------------------------------------------------------------------------------ write_files
NAMES = ("a.safetensors", "b.csv", "c.json")


def three_files(folder: Path, content: int) -> dict:
    """Three files that belong together, all with `content`."""
    values = ({"x": torch.full((3,), content)}, f"{content}", {"x": content})
    return {folder / name: value for name, value in zip(NAMES, values, strict=True)}


def contents(folder: Path) -> list[int | None]:
    readers = (
        lambda path: load_file(path)["x"][0].item(),
        lambda path: int(path.read_text()),
        lambda path: json.loads(path.read_text())["x"],
    )
    paths = (folder / name for name in NAMES)
    return [
        read(path) if path.exists() else None for read, path in zip(readers, paths, strict=True)
    ]


@pytest.mark.parametrize("renamed", range(3))
def test_a_kill_between_two_renames_leaves_no_last_file(renamed, tmp_path, monkeypatch):
    write_files(three_files(tmp_path, 1))
    replace = Path.replace
    counter = count()
    monkeypatch.setattr(
        Path, "replace", lambda s, t: die() if next(counter) == renamed else replace(s, t)
    )
    assert (
        processes.wait(processes.fork(lambda: write_files(three_files(tmp_path, 2))))
        == -signal.SIGKILL
    )
    monkeypatch.undo()
    assert contents(tmp_path)[-1] is None
    write_files(three_files(tmp_path, 2))
    assert contents(tmp_path) == [2, 2, 2]
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_within_safetensors_leaves_nothing_after_the_next_write(tmp_path, monkeypatch):
    """It writes under a random name, in the folder of the file."""

    def killed(tensors, path, *args) -> None:
        (Path(path).parent / ".tmpfH7XyR").write_bytes(b"")
        die()

    monkeypatch.setattr("safetensors.torch.save_file", killed)
    assert (
        processes.wait(processes.fork(lambda: write_files(three_files(tmp_path, 1))))
        == -signal.SIGKILL
    )
    assert list(tmp_path.rglob(".tmp*"))
    monkeypatch.undo()
    write_files(three_files(tmp_path, 2))
    assert contents(tmp_path) == [2, 2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_write_files_on_a_full_disk_leaves_the_old_files(name, tmp_path, monkeypatch):
    write_files(three_files(tmp_path, 1))
    write = files._write

    def full(path: Path, *content) -> None:
        write(path, *content)
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_files(three_files(tmp_path, 2))
    assert contents(tmp_path) == [1, 1, 1]
    assert not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------------------------------------ small file systems
@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of some kilobytes with options of mount."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a small file system needs Linux and root")
    with ExitStack() as mounted:
        folders = (tmp_path / f"disk{i}" for i in count())
        yield lambda kilobytes, options="rw": mounted.enter_context(
            small_disks.mounted(next(folders), f"size={kilobytes}k,{options}")
        )


def test_checkpoint_on_a_full_disk(disk):
    """The previous checkpoint stays valid, and the next one is written once there is space."""
    io = AtomicCheckpointIO()
    folder = disk(1000)
    small = {"weight": torch.zeros(30_000)}
    large = {"weight": torch.ones(300_000)}
    io.save_checkpoint(small, folder / "last.ckpt")
    with pytest.raises((OSError, RuntimeError)):
        io.save_checkpoint(large, folder / "last.ckpt")
    assert latest_valid_checkpoint(folder) == folder / "last.ckpt"
    assert find_defect(folder / "last.ckpt") is None
    assert torch.equal(torch.load(folder / "last.ckpt")["weight"], small["weight"])
    subprocess.run(["mount", "-o", "remount,size=3000k", folder], check=True)
    io.save_checkpoint(large, folder / "last.ckpt")
    assert torch.equal(torch.load(folder / "last.ckpt")["weight"], large["weight"])


@pytest.mark.parametrize("name", ["a.json", "a.json.partial"])
@pytest.mark.parametrize("how", ["files", "file"])
def test_nothing_is_written_through_a_link(name, how, tmp_path):
    victim = tmp_path / "victim"
    file = tmp_path / "a.json"
    victim.write_text("untouched")
    (tmp_path / name).symlink_to(victim)
    if how == "files":
        write_files({file: {}})
    else:
        with atomic_write(file) as partial:
            partial.write_text("{}")
    assert victim.read_text() == "untouched"
    assert json.loads(file.read_text()) == {}
    assert not file.is_symlink()
