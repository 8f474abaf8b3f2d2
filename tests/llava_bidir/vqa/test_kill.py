"""A signal that ends `llava-bidir vqa` ends the process of lmms-eval, too."""

import signal

import psutil
import pytest

from llava_bidir.command_options import VQAOptions
from llava_bidir.vqa.harness import run


def test_lmms_eval_ends_with_the_command(checkpoints, tmp_path):
    """`kill PID` of the command left it running on the GPU."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nkill $PPID\nexec sleep 60\n")
    python.chmod(0o755)
    before = signal.signal(signal.SIGTERM, lambda *_: 1 / 0)
    try:
        with pytest.raises(SystemExit, match="^143$"):
            run(VQAOptions(model=str(checkpoints["causal"]), out=tmp_path, python=python))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
