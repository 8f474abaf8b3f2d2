"""Rows of tables, numbers as text, and the paper's numbers."""

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]  # of results.json, or a row of a table
Rows = list[Entry]
PAPER = json.loads(Path(__file__).with_name("paper.json").read_text())


def format_csv(rows: Rows) -> str:
    """Return CSV text whose columns are the union of all keys in order of appearance; fractions stay 0..1."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def file_name(text: str) -> str:
    """Return a name for files and links: letters, digits, "." and "-" of the text, "_" for all others."""
    return re.sub(r"[^\w.-]", "_", text)


def bounds(ci95: Sequence[float] | None, prefix: str = "") -> dict[str, float | None]:
    """Return the columns of an interval: low and high, both None without one."""
    low, high = ci95 or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}
