"""How far a running step is, and when it and the steps after it will end.

The output of a step goes to a log, and one step can take hours. What runs in it calls :func:`tell`, by :func:`follow`.
A :class:`StepWatcher`, made before the output was redirected, writes lines where the command was called, and returns
the time left, which bars show.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TextIO

from tqdm import tqdm

log = logging.getLogger(__name__)

ProgressKind = Literal["bar", "lines", "none"]
BAR_S = 5.0  # between two drawings of a bar
LINE_S = 10.0  # between two lines of a log
SECONDS = 20.0  # between two lines at first; later a tenth of the time that the step has taken

Watcher = Callable[[str, float, float], str]
_watchers: list[Watcher] = []


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Have a watcher told how far the work in this context is."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(part: str, done: float, total: float) -> str:
    """Tell the innermost watcher how far a part of the work is, and return what it says: the time left, or ""."""
    return _watchers[-1](part, done, total) if _watchers else ""


def follow(items: Iterable[Any], count: int, label: str, kind: ProgressKind) -> Iterator[Any]:
    """Yield so many items; show how many are done, and tell who watches the step."""
    started = last = time.monotonic()
    bar = tqdm(items, label, count, disable=kind != "bar", mininterval=BAR_S)
    for done, item in enumerate(bar, 1):
        yield item
        bar.set_postfix_str(tell(label, done, count), refresh=False)
        now = time.monotonic()
        if kind == "lines" and (now - last >= LINE_S or done == count):
            last = now
            left = format_duration((count - done) * (now - started) / done)
            log.info(f"{label}: {done}/{count}, {left} left")


@contextmanager
def output_of_command() -> Iterator[TextIO | None]:
    """Yield the standard output of now, whatever redirects it later; None where a terminal shows bars."""
    if sys.stderr.isatty():
        yield None
    elif sys.stdout is not sys.__stdout__:  # a notebook's
        yield sys.stdout
    else:
        with os.fdopen(os.dup(sys.stdout.fileno()), "w") as stream:
            yield stream


def format_duration(seconds: float) -> str:
    """Return days, hours, minutes and seconds, e.g. "1 day, 2:03:04"."""
    return str(timedelta(seconds=round(seconds)))


@dataclass
class StepWatcher:
    """Estimates the time left while a step runs, from how fast its present part is and from earlier steps.

    A part that is slower than expected makes the estimate longer. Without an earlier step of its kind, the time is at
    least that of the present part, since others may follow.

    Args:
        name: Of the step.
        kind: Of the step.
        later: Kinds of the steps after it.
        seconds: Mean seconds of the steps that are done, by kind.
        lines: Where lines are written; None for none.
    """

    name: str
    kind: str
    later: Sequence[str]
    seconds: Mapping[str, float]
    lines: TextIO | None = None

    def __post_init__(self):
        self.started = time.monotonic()
        self.last = self.started  # when a line was written
        self.part = ""
        self.part_started = self.started
        self.part_begun = 0.0  # how far it was when it was first heard of

    def __call__(self, part: str, done: float, total: float) -> str:
        """Return the time left of all steps when `done` of `total` units of a part are done; write a line at times."""
        now = time.monotonic()
        elapsed = now - self.started
        if part != self.part:
            self.part = part
            self.part_started = now
            self.part_begun = done
        part_left = None
        if done > self.part_begun:
            seconds_a_unit = (now - self.part_started) / (done - self.part_begun)
            part_left = seconds_a_unit * (total - done)
        left = self.describe_left(elapsed, part_left)
        if self.lines and now - self.last >= max(SECONDS, elapsed / 10):
            self.last = now
            text = f"    {self.name}: {part}, {done:.3g} of {total:.3g}"
            print(", ".join(filter(None, (text, left))), file=self.lines, flush=True)
        return left

    def describe_left(self, elapsed: float = 0.0, part_left: float | None = None) -> str:
        """Return the time left of this step and those after it, "about 3 min left"; "" if nothing is known."""
        bound = "about"
        if self.kind not in self.seconds:
            if part_left is None:
                return ""
            bound = "at least"
        whole = max(elapsed + (part_left or 0.0), self.seconds.get(self.kind, 0.0))
        seconds = {self.kind: whole, **self.seconds}
        later = sum(seconds.get(kind, 0.0) for kind in self.later)
        minutes = max(1, round((whole - elapsed + later) / 60))
        return f"{bound} {minutes} min left"
