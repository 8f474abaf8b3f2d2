"""The tests that prove the promises of tests/README.md, and those of them that CI may skip."""

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]

# {"path/from/tests.py::test_name": reason}. Anything else that is promised and skipped fails in CI.
EXCUSED: dict[str, str] = {}


@functools.cache
def rows() -> dict[str, str]:
    """Return {"path/from/tests.py::test_name": its row of the table of promises}."""
    found = {}
    for line in (TESTS / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            found.update(dict.fromkeys(re.findall(r"`([\w/]+\.py::\w+)`", line), line))
    return found


def name_of(nodeid: str) -> str:
    """Return pytest's node id without the folder `tests` and without parameters."""
    return nodeid.removeprefix("tests/").partition("[")[0]


def promised_tests(nodeid: str) -> list[str]:
    """Return the promised tests that a node is (a test) or contains (a file), less the excused ones."""
    name = name_of(nodeid)
    found = [test for test in rows() if test == name or test.startswith(f"{name}::")]
    return [test for test in found if test not in EXCUSED]
