"""Checks that the harness does not make: every item has one result, from which its score follows."""

from pathlib import Path

from .benchmarks import BENCHMARKS
from .result_files import read_results
from .scores import Item


def find_problems(out: Path, name: str) -> list[str]:
    """Return what is wrong with a finished task of a folder of results. Each message names the task."""
    info, items = read_results(out, name)
    problems = _check_items(name, info, items)
    if not problems:  # scores can be compared only if every item is there
        problems = _check_scores(name, info, items)
    return [f"{name}: {problem}" for problem in problems]


def _check_items(name: str, info: dict, items: list[Item]) -> list[str]:
    found, expected, official = [item["item"] for item in items], info["documents"], BENCHMARKS[name].official_items
    if found != list(range(expected)):
        wrong = [i for i in range(max([expected - 1, *found]) + 1) if found.count(i) != (i < expected)]
        return [f"{len(wrong)} of {expected} items have no or several results, e.g. item {wrong[0]}"]
    if info["data"] == "hub" and official not in (None, expected):
        return [f"{expected} items, but the official split has {official}"]
    return []


def _check_scores(name: str, info: dict, items: list[Item]) -> list[str]:
    """Compare the scores of the harness with ours. The tolerance allows for MMMU, rounded to five places."""
    problems = []
    for title, column in BENCHMARKS[name].columns.items():
        ours, theirs = column.terms(items).score(), info["harness"][title]
        if abs(ours - theirs) > 1e-5 * max(1, abs(theirs)):
            problems.append(f"the harness reports {title} {theirs}, but the items give {ours}")
    return problems
