"""What the benchmarks share: numbers that processes of their own print, and ratios of runs that took turns."""

import os
import statistics
import subprocess
from collections.abc import Sequence


def last_line(command: Sequence[object], **environment: object) -> str:
    """Run a command with variables added to the environment, and return the last line that it prints.

    Raises:
        subprocess.CalledProcessError: It fails.
    """
    added = {name: str(value) for name, value in environment.items()}
    output = subprocess.run(
        [str(word) for word in command],
        env=os.environ | added,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return output.splitlines()[-1]


def ratios(ours: Sequence[float], other: Sequence[float]) -> dict:
    """Return the medians of seconds that were measured in turn, and the ratio of each pair: [min, median, max]."""
    times_slower = sorted(b / a for a, b in zip(ours, other, strict=True))
    return {
        "ours_s": statistics.median(ours),
        "other_s": statistics.median(other),
        "ratio": [times_slower[0], statistics.median(times_slower), times_slower[-1]],
    }
