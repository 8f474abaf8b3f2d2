"""A signal that ends `llava-bidir vqa` ends the process of lmms-eval, too."""

import os
import signal
import sys
import time
from threading import Thread, main_thread

import psutil
import pytest

from llava_bidir.command_options import VQAOptions
from llava_bidir.vqa.harness import run


def end_this_process_when_it_waits(pid_file):
    """Send SIGTERM when the command waits for the program that has written its number."""
    while not (pid_file.is_file() and pid_file.read_text()):
        time.sleep(0.01)
    while "wait" not in sys._current_frames()[main_thread().ident].f_code.co_name:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_lmms_eval_ends_with_the_command(checkpoints, tmp_path):
    """`kill PID` of the command left it running on the GPU."""
    pid_file = tmp_path / "pid"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {pid_file}\nexec sleep 60\n")
    python.chmod(0o755)
    before = signal.signal(signal.SIGTERM, lambda *_: 1 / 0)
    Thread(target=end_this_process_when_it_waits, args=[pid_file], daemon=True).start()
    try:
        with pytest.raises(SystemExit, match="^143$"):
            run(VQAOptions(model=str(checkpoints["causal"]), out=tmp_path, python=python))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not psutil.pid_exists(int(pid_file.read_text()))
