"""Files appear whole or not at all, those that belong together at once, and are on the disk before they have names."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_bidir.common import atomic_io
from llava_bidir.common.atomic_io import write_files


class Killed(BaseException):
    """As a kill: nothing after it may mend anything."""


def files(folder: Path, content: int) -> dict:
    """Three files that belong together, all of which hold `content`."""
    tensors = {"x": torch.full((3,), content)}
    return {folder / "a.safetensors": tensors, folder / "b.csv": f"{content}", folder / "c.json": {"x": content}}


def contents(folder: Path) -> list[int | None]:
    tensors, text, facts = (folder / name for name in ("a.safetensors", "b.csv", "c.json"))
    return [
        load_file(tensors)["x"][0].item() if tensors.exists() else None,
        int(text.read_text()) if text.exists() else None,
        json.loads(facts.read_text())["x"] if facts.exists() else None,
    ]


def test_each_kind_of_content_is_read_back(tmp_path):
    write_files(files(tmp_path / "new/folder", 1))
    write_files({tmp_path / "picture.png": b"bytes"})
    assert contents(tmp_path / "new/folder") == [1, 1, 1]
    assert (tmp_path / "picture.png").read_bytes() == b"bytes"
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("at", range(4))
def test_after_a_kill_between_two_names_the_last_file_says_if_all_are_of_one_kind(at, tmp_path, monkeypatch):
    write_files(files(tmp_path, 1))
    replace, count = Path.replace, 0

    def until_killed(self, target):
        nonlocal count
        if count == at:
            raise Killed
        count += 1
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", until_killed)
    try:
        write_files(files(tmp_path, 2))
    except Killed:
        assert at < 3
    found = contents(tmp_path)
    assert found[-1] is None if at < 3 else found == [2, 2, 2]
    monkeypatch.undo()
    write_files(files(tmp_path, 2))
    assert contents(tmp_path) == [2, 2, 2] and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("full_at", ["a.safetensors", "b.csv", "c.json"])
def test_full_disk_leaves_all_of_before_and_names_the_file(full_at, tmp_path, monkeypatch):
    write_files(files(tmp_path, 1))
    to_disk = atomic_io._sync

    def full(path: Path) -> None:
        if path.name.startswith(full_at):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        to_disk(path)

    monkeypatch.setattr(atomic_io, "_sync", full)
    with pytest.raises(ValueError, match=rf"{full_at} was not written: No space left on device; mend that"):
        write_files(files(tmp_path, 2))
    assert contents(tmp_path) == [1, 1, 1] and not list(tmp_path.glob("*.partial"))


def test_all_are_on_the_disk_before_the_first_has_its_name_and_the_names_after(tmp_path, monkeypatch):
    """Or a power cut could leave empty files under their final names."""
    order, fsync, replace = [], os.fsync, Path.replace

    def error_context(self, target):
        order.append("name")
        return replace(self, target)

    def synced(file):
        order.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    monkeypatch.setattr(Path, "replace", error_context)
    monkeypatch.setattr(os, "fsync", synced)
    write_files(files(tmp_path, 1))
    written = ["a.safetensors.partial", "b.csv.partial", "c.json.partial"]
    assert order == [*written, "name", "name", "name", tmp_path.name]


def test_on_a_slow_disk_a_reader_sees_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path, sizes = tmp_path / "facts.json", set()
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.02))
    write_files({path: [0]})
    writer = threading.Thread(target=lambda: [write_files({path: [n] * 20_000}) for n in range(1, 8)])
    writer.start()
    while writer.is_alive():
        facts = json.loads(path.read_text())
        assert len(set(facts)) == 1 and len(facts) in (1, 20_000)
        sizes.add(facts[0])
    writer.join()
    assert len(sizes) > 2, "it was read while it was written"
