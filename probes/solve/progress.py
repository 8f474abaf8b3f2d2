"""Progress of a run that is solved: a bar on a terminal, else lines of a log."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

from llava_bidir.common.processes import rank
from probes.machine import ProgressKind
from probes.step_progress import format_duration, tell

log = logging.getLogger(__name__)

BAR_S = 5.0  # between two drawings of a bar
LINE_S = 10.0  # between two lines of a log


def follow(
    items: Iterable[Any],
    count: int,
    label: str,
    kind: ProgressKind,
) -> Iterator[Any]:
    """Yield so many items; show on the first process how many are done, and tell who watches the step."""
    is_first = rank() == 0
    started = last = time.monotonic()
    bar = tqdm(
        items,
        label,
        count,
        disable=kind != "bar" or not is_first,
        mininterval=BAR_S,
    )
    for done, item in enumerate(bar, 1):
        yield item
        bar.set_postfix_str(tell(label, done, count), refresh=False)
        now = time.monotonic()
        if kind == "lines" and is_first and (now - last >= LINE_S or done == count):
            last = now
            left = format_duration((count - done) * (now - started) / done)
            log.info(f"{label}: {done}/{count}, {left} left")
