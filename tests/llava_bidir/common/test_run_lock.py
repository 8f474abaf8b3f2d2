"""Two processes never write the same result, and a killed process does not block later ones."""

import errno
import os
import re
import signal
import socket
import time

import processes
import pytest
import tiny_models

from llava_bidir.common import files
from llava_bidir.common.files import exclusive_run_lock


@pytest.fixture
def no_patience(monkeypatch):
    """A second process does not wait for the first one of these tests, which does not exit."""
    monkeypatch.setattr(files, "EXITING_S", 0)


@pytest.mark.usefixtures("no_patience")
def test_a_second_process_is_an_error_that_names_the_holder(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path / "run")) as child:
        who = f"process {child} on {re.escape(socket.gethostname())} since 20"
        for _ in range(2):  # an attempt does not delete the holder's name
            with pytest.raises(
                ValueError, match=rf"run is in use by {who}.*wait until it has ended"
            ):
                with exclusive_run_lock(tmp_path / "run"):
                    pass


def test_a_killed_process_blocks_nobody(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path)) as child:
        os.kill(child, signal.SIGKILL)
        processes.wait(child)
        assert (tmp_path / ".lock").exists(), "it could not clean up"
        with exclusive_run_lock(tmp_path):
            pass
    assert not (tmp_path / ".lock").exists()


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
        with exclusive_run_lock(tmp_path):
            pass
    finally:
        os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


@pytest.mark.usefixtures("no_patience")
def test_results_in_one_folder_have_separate_locks(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path, "hf")):
        with exclusive_run_lock(tmp_path), exclusive_run_lock(tmp_path, "other"):
            pass
        with (
            pytest.raises(ValueError, match="hf is in use by process"),
            exclusive_run_lock(tmp_path, "hf"),
        ):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with exclusive_run_lock(tmp_path):
        (tmp_path / "result").touch()
    assert "does not support locks: a second run" in caplog.text


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("more", [(), ("--ckpt_path", "last")])
def test_a_second_fit_into_a_run_is_an_error(
    more,
    parts,
    conversations,
    tmp_path,
):
    with (
        processes.inside(exclusive_run_lock(tmp_path)),
        pytest.raises(SystemExit, match="is in use by process"),
    ):
        tiny_models.fit(parts, conversations, tmp_path, *more)
    assert [file.name for file in tmp_path.iterdir()] == [".lock"], (
        "the second process has written nothing"
    )
