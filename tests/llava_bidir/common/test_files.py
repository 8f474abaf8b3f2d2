"""Files and folders are complete or absent after a kill, and two processes never write the same result."""

import ast
import errno
import json
import os
import re
import signal
import time
from itertools import count
from pathlib import Path

import processes
import pytest
import small_disks
import tiny_models
import torch
from processes import die
from safetensors.torch import save_file

from llava_bidir.common import files
from llava_bidir.common.errors import UserError
from llava_bidir.common.files import atomic_directory, atomic_write, exclusive_run_lock, write_files


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
    write, result, moment, tmp_path, monkeypatch
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


# ------------------------------------------------------------------------------------------------ no other writes
ROOT = Path(__file__).parents[3]
WRITERS = {
    "save",
    "save_file",
    "save_pretrained",
    "savefig",
    "savez",
    "savez_compressed",
    "to_csv",
    "to_parquet",
    "write_bytes",
    "write_text",
}
UNNAMED = {"drawn", "stream", "content"}  # io.BytesIO
WHOLE = {  # functions that write otherwise: why that is whole
    "llava_bidir/common/files.py:_write": "its path is temporary",
    "llava_bidir/model/export.py:_add_mask": "in the folder of export_hf",
    "llava_bidir/model/export.py:_add_released_rope": "in the folder of export_hf",
    "llava_bidir/model/modeling_llava_bidir.py:save_pretrained": "transformers' own, for users",
    "llava_bidir/training/deepspeed_strategy.py:save_checkpoint": "in a folder that is then renamed",
    "probes/minimal.py:main": "one picture, which nothing reads",
    "probes/solve/run.py:solve_sites": "SiteFiles.save, which calls write_files",
    "probes/steps/runner.py:_describe_failure": "a log",
    "probes/studies/run.py:_output_to": "a log",
    "probes/worlds/assets.py:_write_patches": "in the folder of run",
    "probes/worlds/assets.py:save_pictures": "in the folder of run",
    "probes/worlds/assets.py:write_classes": "in the folder of run",
    "probes/worlds/steps.py:run_in_child_process": "a log",
    "probes/worlds/tiny_models.py:train_encoder": "in the folder of assets.run",
    "probes/worlds/tiny_models.py:train_llm": "in the folder of assets.run",
    "probes/worlds/tiny_models.py:train_tokenizer": "in the folder of assets.run",
    "probes/masks/command.py:put_image": "in the folder of run",
    "probes/masks/command.py:write_mask": "in the folder of run",
}


def writes(call: ast.AST) -> bool:
    """Return whether a call writes a file."""
    if not isinstance(call, ast.Call):
        return False
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    words = [ast.unparse(word) for word in call.args]
    if name == "open":
        words += [ast.unparse(x.value) for x in call.keywords]
        return any(re.fullmatch("'[rbt]*[wax].*'", word) for word in words)
    return name in WRITERS and bool(words) and words[0] not in UNNAMED


def writers_in_place(tree: ast.AST, function: str = "") -> set[str]:
    """Return the functions that write outside of `with atomic_write(...)` and `with atomic_directory(...)`."""
    if isinstance(tree, ast.With) and "atomic_" in "".join(map(ast.unparse, tree.items)):
        return set()
    if isinstance(tree, ast.FunctionDef):
        function = tree.name
    writers = {function} if writes(tree) else set()
    return writers.union(
        *(writers_in_place(child, function) for child in ast.iter_child_nodes(tree))
    )


def test_every_file_is_written_whole_or_not_at_all():
    """A run's pictures.npz, which its neighbours read, was written in place; a full disk ended them all."""
    writers = {
        f"{file.relative_to(ROOT)}:{function}"
        for package in ("llava_bidir", "probes")
        for file in (ROOT / package).rglob("*.py")
        for function in writers_in_place(ast.parse(file.read_text()))
    }
    assert writers == {*WHOLE}, "use atomic_write, write_files or atomic_directory"


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
    with pytest.raises(
        UserError, match="cannot write .*b.csv: No space left on device; free space"
    ):
        write_files(three_files(tmp_path, 2))
    assert contents(tmp_path) == [1, 1, 1]
    assert not list(tmp_path.glob("*.partial"))


def test_json_has_null_for_what_json_cannot_say(tmp_path):
    values = {"a": [float("nan"), (float("inf"), 1.5)], "b": -float("inf")}
    write_files({tmp_path / "x.json": values})
    refuse = {"parse_constant": lambda text: pytest.fail(text)}
    read = json.loads((tmp_path / "x.json").read_text(), **refuse)
    assert read == {"a": [None, [None, 1.5]], "b": None}


def save_text(file: Path) -> None:
    file.write_bytes(bytes(10**6))


def save_tensors(file: Path) -> None:
    save_file({"x": torch.zeros(10**6)}, file)


def save_checkpoint(file: Path) -> None:
    with file.open("wb") as stream:
        torch.save(torch.zeros(10**6), stream)


@pytest.mark.parametrize("save", [save_text, save_tensors, save_checkpoint])
def test_a_full_disk_is_one_sentence_with_the_path(save, tmp_path):
    """torch raises another error, safetensors quotes it."""
    with (
        small_disks.mounted(tmp_path / "disk", "size=100k") as disk,
        pytest.raises(
            UserError, match="cannot write .*disk/x: No space left on device; free space"
        ),
        atomic_write(disk / "x") as partial,
    ):
        save(partial)


def test_a_read_only_folder_is_named(tmp_path):
    with small_disks.mounted(tmp_path / "disk", "size=100k,ro") as disk:
        with pytest.raises(UserError, match="cannot write .*disk/a/b: Read-only file system"):
            write_files({disk / "a/b": "text"})
        with (
            pytest.raises(UserError, match="disk/run: Read-only file system; choose another"),
            exclusive_run_lock(disk / "run"),
        ):
            pass


@pytest.mark.parametrize("path", [".", "..", "{here}"])
def test_the_folder_that_one_is_in_is_not_replaced(path, tmp_path, monkeypatch):
    """It was `'.' has an empty name`; and a shell would stay in the folder that was replaced."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(UserError, match="is the folder that you are in.* choose a folder inside"):
        write_directory(Path(path.format(here=Path.cwd())), "new")
    write_directory(Path("new"), "new")
    assert (tmp_path / "inside/new/file").is_file()


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
