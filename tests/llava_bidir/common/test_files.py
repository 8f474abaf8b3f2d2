"""Files and folders are complete or absent after a kill, and two processes never write the same result."""

import errno
import os
import signal
import time
from itertools import count
from pathlib import Path

import processes
import pytest
import tiny_models
import torch
from processes import die
from safetensors.torch import save_file

from llava_bidir.common import files
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import (
    atomic_directory,
    atomic_write,
    exclusive_run_lock,
    write_files,
)


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


def test_files_of_a_folder_can_be_read_by_a_group(tmp_path):
    """safetensors writes 0600."""
    with atomic_directory(tmp_path / "hf", "b.safetensors") as partial:
        save_file({"x": torch.zeros(1)}, partial / "b.safetensors")
    assert (tmp_path / "hf/b.safetensors").stat().st_mode & 0o777 == 0o644


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
NAMES = ("a.txt", "b.csv", "c.txt")


def three_files(folder: Path, content: int) -> dict[Path, str]:
    """Three files that belong together, all with `content`."""
    return {folder / name: f"{content}" for name in NAMES}


def contents(folder: Path) -> list[int | None]:
    paths = (folder / name for name in NAMES)
    return [int(path.read_text()) if path.exists() else None for path in paths]


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


def test_write_files_on_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    write_files(three_files(tmp_path, 1))
    write = files._write

    def full(path: Path, *content) -> None:
        write(path, *content)
        if path.name.startswith(NAMES[1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_files(three_files(tmp_path, 2))
    assert contents(tmp_path) == [1, 1, 1]
    assert not list(tmp_path.glob("*.partial"))


# ------------------------------------------------------------------------------------------------ locks
def test_a_second_process_is_an_error(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path, "hf")):
        for _ in range(2):  # an attempt does not release the lock
            with pytest.raises(UserError, match="hf is in use by another process; wait until it"):
                with exclusive_run_lock(tmp_path, "hf", wait_s=0):
                    pass
        with exclusive_run_lock(tmp_path), exclusive_run_lock(tmp_path, "other"):
            pass


def test_workers_that_outlive_a_killed_process_block_nobody(tmp_path):
    """Workers of a data loader are forked and exit some seconds later."""

    def hold_and_fork():
        with exclusive_run_lock(tmp_path):
            worker = processes.fork(lambda: time.sleep(600))
            (tmp_path / "worker").write_text(str(worker))
            time.sleep(600)

    child = processes.fork(hold_and_fork)
    while not (tmp_path / "worker").exists() or not (tmp_path / "worker").read_text():
        time.sleep(0.01)
    processes.kill_after(0, child)
    try:
        assert (tmp_path / ".lock").exists(), "it could not clean up"
        with exclusive_run_lock(tmp_path):
            pass
        assert not (tmp_path / ".lock").exists()
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_file_system_without_locks_is_used(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.warns(UserWarning), exclusive_run_lock(tmp_path):
        (tmp_path / "result").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_second_fit_into_a_run_is_an_error(parts, conversations, tmp_path):
    with (
        processes.inside(exclusive_run_lock(tmp_path)),
        pytest.raises(SystemExit, match="is in use by another process"),
    ):
        tiny_models.fit(parts, conversations, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"], (
        "the second process has written nothing"
    )
