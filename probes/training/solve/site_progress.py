"""Progress of a solver: batches of a pass, and sites with the minimisations that each has ended.

A site can take minutes, in a process of its own. It counts its minimisations, of all folds at one strength or of all
probes, in memory that it shares; how many a site needs is known from those that are solved.
"""

import logging
import mmap
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from llava_bidir.common.step_progress import format_duration, tell

log = logging.getLogger(__name__)

# Minimisations of a site, until one is solved: 9 or 10 at layers 2, 6 and 12 of DINOv2-S on 60 photos of MSRC
EXPECTED = 10
ALMOST = 0.95  # of a site that has ended more than expected
POLL_S = 1.0
BAR_S = 5.0  # between two drawings of a bar
LINE_S = 10.0  # between two lines of a log
BAR = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"

Item = TypeVar("Item")
_counter: tuple[np.ndarray, int] | None = None  # of the site that this process solves


def follow(items: Iterable[Item], count: int, label: str, hidden: bool) -> Iterator[Item]:
    """Yield so many items, show a bar unless it is hidden, and tell who watches the step."""
    with tqdm(total=count, desc=label, disable=hidden, mininterval=BAR_S) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.set_postfix_str(tell(label, done, count), refresh=False)
            bar.update()


def log_pass(batches: Sized) -> Iterator:
    """Yield batches of a pass; log some of them, with the rate and the time left."""
    started = last = time.monotonic()
    for done, batch in enumerate(batches, 1):
        yield batch
        now = time.monotonic()
        if now - last >= LINE_S or done == len(batches):
            last = now
            rate = done / max(now - started, 1e-9)
            left = format_duration((len(batches) - done) / rate)
            log.info(f"batch {done}/{len(batches)} of a pass, {rate:.3g} batches/s, {left} left")


def count_minimisation() -> None:
    """Count a minimisation of the site that this process solves, if it is watched."""
    if _counter is not None:
        counts, site = _counter
        counts[site] += 1


class SiteProgress:
    """How many minimisations each site of a process has ended.

    Args:
        sites: Number of sites.
    """

    def __init__(self, sites: int):
        # anonymous memory, which processes that are forked later share
        self.counts = np.frombuffer(mmap.mmap(-1, 8 * max(1, sites)), np.int64)
        self.solved = np.zeros(sites, bool)

    def begin(self, site: int) -> None:
        """Count the minimisations of this process for a site from now on."""
        global _counter
        _counter = (self.counts, site)

    def end(self, site: int) -> None:
        """Take note that a site is solved."""
        self.solved[site] = True

    @property
    def done(self) -> float:
        """Number of sites that are solved, and the shares of those that are not."""
        counts = self.counts[: len(self.solved)]
        ended = counts[self.solved]
        expected = ended.mean() if len(ended) and ended.mean() > 0 else EXPECTED
        shares = np.minimum(counts[~self.solved] / expected, ALMOST)
        return float(len(ended) + shares.sum())

    @contextmanager
    def shown(self, label: str, hidden: bool) -> Iterator[None]:
        """Show a bar that moves while sites are solved, unless it is hidden, and tell who watches the step."""
        total = len(self.solved)
        ended = threading.Event()
        with tqdm(
            total=total,
            desc=label,
            disable=hidden,
            mininterval=BAR_S,
            miniters=0,
            bar_format=BAR,
        ) as bar:

            def move() -> None:
                done = self.done
                bar.set_postfix_str(tell(label, done, total), refresh=False)
                bar.update(max(0.0, done - bar.n))

            def poll() -> None:
                while not ended.wait(POLL_S):
                    move()

            thread = threading.Thread(target=poll, daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
                move()
