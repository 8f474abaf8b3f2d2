"""The work of several sites on the cores of a machine."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from probes.training.distributed import rank


def in_workers(
    work: Callable[[str], Any], sites: list[str], device: torch.device
) -> Iterable[tuple[str, Any]]:
    """Yield each site with the result of its work, on a CPU as many at a time as torch has threads.

    Each worker has one thread, so that the bits of a site do not depend on their number. They are processes, which
    share the memory of this one: threads would wait for Python's lock and be as slow as one. DataLoader ends them with
    this process, however it ends.
    """
    threads = (
        torch.get_num_threads() if sites and device.type == "cpu" and sys.platform == "linux" else 1
    )
    # one site alone, too, which has as many threads here: they would round differently
    processes = (
        {"num_workers": min(threads, len(sites)), "multiprocessing_context": "fork"}
        if threads > 1
        else {}
    )
    results = DataLoader(
        _Results(work, sites),
        batch_size=None,
        collate_fn=lambda result: result,
        **processes,
    )
    yield from zip(
        sites, tqdm(results, "solving sites", disable=rank() > 0, mininterval=5), strict=True
    )


class _Results(Dataset):
    """The result of some work for each site, done when it is asked for."""

    def __init__(self, work: Callable[[str], Any], sites: list[str]):
        self.work = work
        self.sites = sites

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.sites[index])
