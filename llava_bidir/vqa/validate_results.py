"""What the harness does not check of results: that each item is there once, with an answer of the kind asked for."""

from collections import Counter
from pathlib import Path

from .benchmarks import BENCHMARKS, Item
from .result_files import pins, read_results


def problems(out: Path, name: str, max_invalid_rate: float) -> list[str]:
    """What is wrong with a finished task, each with the name of the task and of an item; empty if nothing is.

    Args:
        out: Folder of results.
        name: Of the benchmark.
        max_invalid_rate: Largest share of answers that may be empty or not of the kind asked for.
    """
    facts, items = read_results(out, name)
    found = [*_versions(facts), *_counts(name, facts, items)]
    if not found:  # or scores could not be compared
        found = [*_scores(name, facts, items), *_answers(name, items, max_invalid_rate)]
    return [f"{name}: {problem}" for problem in found]


def _versions(facts: dict) -> list[str]:
    wrong = [f"{p} {facts['versions'].get(p)} instead of {v}" for p, v in pins().items() if _differs(facts, p, v)]
    return [f"its results were made with {', '.join(wrong)}; delete them to have the task run again"] if wrong else []


def _differs(facts: dict, package: str, version: str) -> bool:
    return facts["versions"].get(package, "").partition("+")[0] != version


def _counts(name: str, facts: dict, items: list[Item]) -> list[str]:
    results, expected = Counter(item["item"] for item in items), facts["documents"]
    missing = sorted(set(range(expected)) - results.keys())
    twice = sorted(number for number, times in results.items() if times > 1)
    found = []
    if missing:
        found.append(f"{len(missing)} of {expected} items have no result, item {missing[0]} for one")
    if twice:
        found.append(f"{len(twice)} items have several results, item {twice[0]} for one")
    if not items:
        found.append("the harness yielded no results")
    if facts["data"] == "hub" and BENCHMARKS[name].items not in (None, expected):
        found.append(f"{expected} items, but the official split has {BENCHMARKS[name].items}")
    return found


def _scores(name: str, facts: dict, items: list[Item]) -> list[str]:
    """The harness's numbers against ours of its items. It rounds MMMU's to five places."""
    found = []
    for title, column in BENCHMARKS[name].columns.items():
        ours, theirs = column.parts(items).score(), facts["harness"][title]
        if abs(ours - theirs) > 1e-5 * max(1, abs(theirs)):
            found.append(f"the harness says {title} {theirs}, its items say {ours}")
    return found


def _answers(name: str, items: list[Item], max_invalid_rate: float) -> list[str]:
    bad = unusable(name, items)
    if len(bad) <= max_invalid_rate * len(items):
        return []
    return [
        f"{len(bad)} of {len(items)} answers are empty or not of the kind asked for, item {bad[0]['item']} for one: "
        f"{bad[0]['answer'][:40]!r}; --max-invalid-rate {max_invalid_rate} allows fewer"
    ]


def unusable(name: str, items: list[Item]) -> list[Item]:
    """Items whose answer is empty, or has no letter, no yes and no no where one is asked for.

    The harness counts them as wrong, and guesses for them in MMMU.
    """
    return [item for item in items if not item["answer"].strip() or not BENCHMARKS[name].usable(item["answer"])]
