"""Workers of data loaders: what they cannot send ends the command, with the reason."""

import errno
import os
from collections.abc import Callable

import processes
import pytest
import torch
from torch.utils.data import DataLoader

from llava_bidir.common.errors import one_line_errors
from llava_bidir.common.processes import worker_options
from probes.solve import workers


class TooLarge:
    """What shared memory has no room for."""

    def __reduce__(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def load_batch() -> None:
    list(DataLoader([0], batch_size=None, collate_fn=lambda _: TooLarge(), **worker_options(1)))


def solve_sites() -> None:
    workers.threads_of = lambda device: 2
    list(workers.in_workers(lambda site: TooLarge(), ["layer_01"], torch.device("cpu")))


@pytest.mark.parametrize("work", [load_batch, solve_sites])
def test_a_full_shared_memory_ends_the_command_with_the_reason(
    work: Callable[[], None], tmp_path, monkeypatch
):
    """Docker's default is 64 MB: the command waited for ever."""

    def command() -> None:
        with one_line_errors("probes"):
            work()

    log = tmp_path / "log"
    assert processes.kill_after(30, processes.fork(command, log)) == 1, "it did not hang"
    assert (
        "SystemExit: probes: a worker of a data loader cannot send its results: " in log.read_text()
    )
    assert (
        "No space left on device; where shared memory is full, enlarge /dev/shm" in log.read_text()
    )
