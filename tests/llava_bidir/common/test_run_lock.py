"""Two processes never write the same result, and a killed one keeps nobody out."""

import errno
import os
import re
import signal
import socket
import time

import processes
import pytest
import tiny_models

from llava_bidir import cli
from llava_bidir.common.run_lock import exclusive_run_lock
from llava_bidir.model.build import build_model, build_processor
from llava_bidir.model.hf_export import export_hf


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path / "run")) as child:
        who = f"process {child} on {re.escape(socket.gethostname())} since 20"
        for _ in range(2):  # being refused does not wipe out who holds it
            with pytest.raises(ValueError, match=rf"run is in use by {who}.*wait until that has ended"):
                with exclusive_run_lock(tmp_path / "run"):
                    pass


def test_a_killed_process_keeps_nobody_out(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path)) as child:
        os.kill(child, signal.SIGKILL)
        processes.wait(child)
        assert (tmp_path / ".lock").exists(), "it had no time to clear up"
        with exclusive_run_lock(tmp_path):
            pass
    assert not (tmp_path / ".lock").exists()


def test_workers_that_outlive_a_killed_process_keep_nobody_out(tmp_path):
    """A data loader's workers are forked and take some seconds to notice."""

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


def test_results_in_one_folder_have_locks_of_their_own(tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path, "hf")):
        with exclusive_run_lock(tmp_path), exclusive_run_lock(tmp_path, "other"):
            pass
        with pytest.raises(ValueError, match="hf is in use by process"), exclusive_run_lock(tmp_path, "hf"):
            pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def flock(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with exclusive_run_lock(tmp_path):
        (tmp_path / "result").touch()
    assert "has no locks: nothing keeps a second run out" in caplog.text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written into .*file/run: Not a directory"):
        with exclusive_run_lock(tmp_path / "file/run"):
            pass


@pytest.mark.parametrize("more", [(), ("--ckpt_path", "last")])
def test_a_second_fit_into_a_run_is_refused(more, parts, conversations, tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path)), pytest.raises(SystemExit, match="is in use by process"):
        cli.main(["fit", *tiny_models.training_arguments(parts, conversations), "--out", str(tmp_path), *more])
    assert [file.name for file in tmp_path.iterdir()] == [".lock"], "the second has written nothing"


def test_a_second_vqa_into_a_folder_is_refused(checkpoints, tmp_path):
    with processes.inside(exclusive_run_lock(tmp_path)), pytest.raises(SystemExit, match="is in use by process"):
        cli.main(["vqa", str(checkpoints["causal"]), "--out", str(tmp_path), "--tasks", "toy"])


def test_a_second_export_to_a_folder_is_refused(parts, tmp_path):
    encoder, llm = parts
    processor = build_processor(encoder, llm)
    with (
        processes.inside(exclusive_run_lock(tmp_path, "hf")),
        pytest.raises(ValueError, match="hf is in use by process"),
    ):
        export_hf(build_model(encoder, llm, processor), processor, tmp_path / "hf")


def test_second_demo_assets_to_a_folder_are_refused(tmp_path):
    with (
        processes.inside(exclusive_run_lock(tmp_path, "assets")),
        pytest.raises(SystemExit, match="is in use by process"),
    ):
        cli.main(["demo-assets", str(tmp_path / "assets"), "--scale", "0.01"])
