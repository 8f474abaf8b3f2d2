"""The files that prove the promises of tests/README.md: CI may not skip a test of theirs."""

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


@functools.cache
def files() -> list[str]:
    """Return the files of the tables of promises, relative to `tests`."""
    rows = (TESTS / "README.md").read_text(encoding="utf-8").splitlines()
    return [file for row in rows for file in re.findall(r"\| `([\w/]+\.py)` \|$", row)]


def is_promised(nodeid: str) -> bool:
    """Return whether pytest's node is in a file that proves a promise."""
    return nodeid.removeprefix("tests/").partition("::")[0] in files()
