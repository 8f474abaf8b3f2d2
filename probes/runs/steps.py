"""Steps of a study that were left out or have failed, as DIR/steps/*.json say; the report names them."""

from collections.abc import Iterable
from pathlib import Path

from probes.steps import OUTCOMES, read_records

LEFT_OUT = OUTCOMES["left_out"]
FAILED = OUTCOMES["failed"]


def unfinished_steps(folder: str | Path) -> list[dict[str, str]]:
    """Return {"step", "outcome", "reason"} of each step of a study that has no result, in the order of their names."""
    found = []
    for record in read_records(Path(folder)):
        for key, outcome in OUTCOMES.items():
            if record.get(key):
                found.append(
                    {
                        "step": record["step"],
                        "outcome": outcome,
                        "reason": record[key],
                    }
                )
    return found


def describe_steps(unfinished: Iterable[dict[str, str]], outcome: str) -> list[str]:
    """Return a line for each reason of the steps of :func:`unfinished_steps` with an outcome, LEFT_OUT or FAILED.

    What failed must be looked at, and is said first; what was left out had nothing to measure, and is said last.
    """
    steps: dict[str, list[str]] = {}
    for entry in unfinished:
        if entry["outcome"] == outcome:
            steps.setdefault(entry["reason"], []).append(entry["step"])
    return [f"{', '.join(names)} {outcome}: {reason}" for reason, names in steps.items()]
