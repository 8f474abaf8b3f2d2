"""Files shared by the harness's environment and ours: pinned versions, and the results of a task.

A finished task has TASK.json with its scores and settings, and TASK.jsonl with one line per item.
"""

import json
import re
from pathlib import Path

from llava_bidir.common.atomic_io import write_files
from llava_bidir.common.errors import UserError

from .benchmarks import BENCHMARKS
from .scores import Item

PACKAGE = Path(__file__).resolve().parents[1]  # the harness must run the same copy


class ItemError(Exception):
    """Error for an item that could not be answered."""


def pinned_versions() -> dict[str, str]:
    """Return the versions that `make vqa-venv` installs, by package."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    return dict(
        line.partition("#")[0].strip().split("==") for line in lines if re.match(r"[\w.-]+==", line)
    )


def error_file(out: Path) -> Path:
    """Return the path of the harness's error message."""
    return out / "harness" / "error.txt"


def results_file(out: Path, name: str) -> Path:
    """Return the path of a task's scores. The file exists if and only if the task is finished."""
    return out / f"{name}.json"


def write_results(
    out: Path,
    name: str,
    info: dict,
    items: list[Item],
) -> None:
    """Write both files of a finished task."""
    lines = "".join(json.dumps(item) + "\n" for item in items)
    write_files({out / f"{name}.jsonl": lines, results_file(out, name): info})


def read_results(out: Path, name: str) -> tuple[dict, list[Item]]:
    """Return the info and the items of a finished task.

    Raises:
        UserError: A file is missing or invalid, an item has no result or several, or the harness's score does not
            follow from the items.
    """
    try:
        info = json.loads(results_file(out, name).read_text())
        items = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{results_file(out, name)}: {error}; delete it to run the task again"
        ) from error
    if problem := _find_problem(name, info, items):
        raise UserError(f"{out}/{name}: {problem}")
    return info, items


def _find_problem(name: str, info: dict, items: list[Item]) -> str | None:
    numbers = sorted(i["item"] for i in items)
    expected = info["documents"]
    official = BENCHMARKS[name].official_items
    if numbers != list(range(expected)):
        wrong = [i for i in range(expected) if numbers.count(i) != 1]
        return f"{len(wrong)} of {expected} items have no or several results, e.g. item {wrong[0]}"
    if info["data"] == "hub" and official not in (None, expected):
        return f"{expected} items, but the official split has {official}"
    for title, column in BENCHMARKS[name].columns.items():
        if column.metric is None:
            continue
        ours = column.terms(items).score()
        theirs = info["harness"][title]
        if abs(ours - theirs) > 1e-5 * max(1, abs(theirs)):  # MMMU is rounded to five places
            return f"the harness reports {title} {theirs}, but the items give {ours}"
    return None
