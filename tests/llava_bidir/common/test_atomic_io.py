"""What is written is whole or not there: after a kill at any moment, on a full disk, on a read-only one."""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from itertools import count

import processes
import pytest
import small_disks
import tiny_models
import torch

from llava_bidir import cli
from llava_bidir.common.atomic_io import atomic_directory, atomic_write
from llava_bidir.common.checkpoint_io import AtomicCheckpointIO, find_defect, latest_valid_checkpoint
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.hf_export import export_hf
from llava_bidir.vqa.result_files import read_results, results_file, write_results


@pytest.fixture
def disk(tmp_path):
    """A function that makes a file system of so many kilobytes, with mount's options."""
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a small file system needs Linux and root")
    with ExitStack() as mounted:
        folders = (tmp_path / f"disk{i}" for i in count())
        yield lambda kilobytes, options="rw": mounted.enter_context(
            small_disks.mounted(next(folders), f"size={kilobytes}k,{options}")
        )


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_is_the_old_one_after_a_kill_before_its_name(moment, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with atomic_write(path) as partial:
            partial.write_text("new")
            monkeypatch.setattr(moment, die)

    assert processes.wait(processes.fork(write)) == -signal.SIGKILL
    assert path.read_text() == "old"
    with atomic_write(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.rename"])
def test_a_folder_is_the_old_one_after_a_kill_before_its_name(moment, tmp_path, monkeypatch):
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with atomic_directory(path, "file") as partial:
            (partial / "file").write_text(text)
        if text == "old":

            def write():
                with atomic_directory(path, "file") as partial:
                    (partial / "file").write_text("cut short")
                    monkeypatch.setattr(moment, die)

            assert processes.wait(processes.fork(write)) == -signal.SIGKILL
        assert (path / "file").read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("there", ["thesis.txt", "file/thesis.txt", None])
def test_what_is_something_else_is_not_replaced(there, tmp_path):
    """`llava-bidir export CKPT ~` would otherwise be the end of a home."""
    path = tmp_path / "folder"
    (path / there if there else path).parent.mkdir(parents=True, exist_ok=True)
    (path / there if there else path).write_text("four years")
    with pytest.raises(ValueError, match="folder is there and holds no file: it is something else"):
        with atomic_directory(path, "file"):
            pytest.fail("written all the same")
    assert (path / there if there else path).read_text() == "four years"
    with atomic_directory(tmp_path / "empty", "file") as partial:
        (tmp_path / "empty").mkdir()
        (partial / "file").touch()
    assert (tmp_path / "empty/file").is_file()


def test_contents_are_on_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    """A power cut cannot be had in a test; the order of what the system is asked for can."""
    asked, sync, replace, rename = [], os.fsync, type(tmp_path).replace, type(tmp_path).rename
    monkeypatch.setattr(
        "os.fsync", lambda d: (asked.append(os.path.basename(os.readlink(f"/proc/self/fd/{d}"))), sync(d))
    )
    monkeypatch.setattr("pathlib.Path.replace", lambda s, t: (asked.append("named"), replace(s, t)))
    monkeypatch.setattr("pathlib.Path.rename", lambda s, t: (asked.append("named"), rename(s, t)))
    with atomic_write(tmp_path / "a") as partial:
        partial.touch()
    assert asked == ["a.partial", "named", tmp_path.name]
    asked.clear()
    with atomic_directory(tmp_path / "b", "inside") as partial:
        (partial / "inside").touch()
    assert set(asked[:2]) == {"inside", "b.partial"} and asked[2:] == ["named", tmp_path.name]


def test_other_errors_inside_stay_what_they_are(tmp_path):
    for error in (RuntimeError("a tensor differs"), ValueError("a setting")):
        with pytest.raises(type(error), match=str(error)), atomic_directory(tmp_path / "folder", "file"):
            raise error
    assert not any(tmp_path.iterdir())


def test_checkpoint_on_a_full_disk(disk):
    """The one before is whole, and the next one is written as soon as there is room again."""
    io, folder = AtomicCheckpointIO(), disk(1000)
    small, large = {"weight": torch.zeros(30_000)}, {"weight": torch.ones(300_000)}
    io.save_checkpoint(small, folder / "last.ckpt")
    with pytest.raises(ValueError, match="last.ckpt was not written: .*No space left on device"):
        io.save_checkpoint(large, folder / "last.ckpt")
    assert latest_valid_checkpoint(folder) == folder / "last.ckpt" and find_defect(folder / "last.ckpt") is None
    assert torch.equal(torch.load(folder / "last.ckpt")["weight"], small["weight"])
    subprocess.run(["mount", "-o", "remount,size=3000k", folder], check=True)
    io.save_checkpoint(large, folder / "last.ckpt")
    assert torch.equal(torch.load(folder / "last.ckpt")["weight"], large["weight"])


@pytest.mark.parametrize("kilobytes", [60, 240])
def test_export_on_a_full_disk(kilobytes, disk, parts):
    encoder, llm = parts
    processor = build_processor(encoder, llm)
    folder = disk(kilobytes)
    with pytest.raises(ValueError, match=r"hf was not written: .*No space left on device"):
        export_hf(build_model(encoder, llm, processor), processor, folder / "hf")
    assert not any(folder.iterdir()), "and room is made again"


def test_vqa_results_on_a_full_disk(disk):
    folder = disk(100)
    with pytest.raises(ValueError, match=r"pope.jsonl was not written: .*No space left on device"):
        write_results(folder, "pope", {"benchmark": "pope"}, [{"answer": "x" * 200_000}])
    assert not results_file(folder, "pope").exists(), "so the task runs again"
    write_results(folder, "pope", {"benchmark": "pope"}, [{"answer": "x"}])
    assert read_results(folder, "pope") == ({"benchmark": "pope"}, [{"answer": "x"}])


@pytest.mark.slow
def test_demo_assets_on_a_full_disk(disk):
    folder = disk(80)
    with pytest.raises(SystemExit, match=r"assets was not written: .*No space left on device"):
        cli.main(["demo-assets", str(folder / "assets"), "--scale", "0.01"])
    assert not any(folder.iterdir())


def test_fit_into_a_read_only_folder_is_refused_before_it_begins(disk, parts, conversations, monkeypatch):
    monkeypatch.setattr("lightning.Trainer.fit", lambda *args, **kwargs: pytest.fail("training began"))
    out = disk(100, "ro") / "run"
    with pytest.raises(SystemExit, match="nothing can be written into .*run: Read-only file system; choose another"):
        cli.main(["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(out)])
