"""probes/python.md has each public name with the first line of its docstring.

After a change: `GOLDEN=write python -m pytest tests/probes/test_public_names.py`.
"""

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import probes

PAGE = Path(probes.__file__).parent / "python.md"
ROW = "| `{}` | {} |"


def rows(prefix: str, *classes: type) -> Iterator[str]:
    """Yield a row for each public method and property that classes, or bases of ours, define, base first."""
    lines: dict[str, str] = {}
    for kind in classes:
        for base in reversed([x for x in kind.__mro__ if x.__module__.startswith("probes.")]):
            for name, value in vars(base).items():
                function = getattr(value, "fget", None) or getattr(value, "func", value)
                if not name.startswith("_") and inspect.isfunction(function):
                    lines.setdefault(name, first_line(function))
    yield from (ROW.format(f"{prefix}.{name}", lines[name]) for name in lines)


def first_line(documented) -> str:
    """Return the first line of a docstring, with names as Markdown has them."""
    return re.sub(r":\w+:(`)", r"\1", inspect.getdoc(documented).partition("\n")[0])


def parts() -> dict[str, list[str]]:
    """Return the rows of the page by their heading."""
    names = [ROW.format(f"probes.{x}", first_line(getattr(probes, x))) for x in probes.__all__]
    return {
        "## The package": names,
        '## A loaded model, `mllm = probes.load("DIR")`': [
            *rows("mllm", probes.FrozenMLLM, probes.FrozenEncoder)
        ],
        '## A finished run, `run = probes.ProbeRun("RUN")`': [*rows("run", probes.ProbeRun)],
    }


def test_page_has_each_public_name_with_one_line():
    text = PAGE.read_text().partition("\n## ")[0].rstrip()
    for heading, lines in parts().items():
        text += "\n\n" + "\n".join([heading, "", "| name | what it does |", "|---|---|", *lines])
    if os.environ.get("GOLDEN") == "write":
        PAGE.write_text(text + "\n")
    assert PAGE.read_text() == text + "\n", "GOLDEN=write makes the page again"
    for line in ("`mllm.attention`", "`mllm.states`", "`run.predict`", "`probes.load`"):
        assert line in text
