"""Worker processes of data loaders where shared memory is short, as the 64 MB of a container are."""

import subprocess
import sys

import pytest
from processes import run_command

CUT = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
READ = """
import sys
import torch
from torch.utils.data import DataLoader
from llava_bidir.common.errors import UserError, one_line_errors
from llava_bidir.common.processes import worker_options

class Batches(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(int(sys.argv[1]))

with one_line_errors("probes"):
    try:
        for batch in DataLoader(Batches(), batch_size=None, **worker_options(2)):
            print(batch.shape)
    except UserError as error:
        raise UserError(f"trained: {error}")  # as a study names its step
"""


def read(numbers: int):
    """Read eight batches of so many float32 in a process with 1 MB of shared memory."""
    command = [*CUT, MOUNT, "sh", sys.executable, "-c", READ, numbers]
    return run_command(command, must_pass=False, timeout=300)


@pytest.fixture(autouse=True)
def _can_mount():
    if subprocess.run([*CUT, MOUNT, "sh", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")


def test_too_little_shared_memory_ends_with_the_remedy():
    """The main process waited for ever."""
    done = read(1_000_000)
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("probes: trained: a worker of the data loader cannot pass on its ")
    assert "No space left" in message
    assert "--shm-size 8g" in message and "--data.num_workers 0" in message


def test_batches_that_fit_one_after_the_other_are_read():
    done = read(40_000)  # two workers with two each have 640 kB
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size([40000])") == 8
