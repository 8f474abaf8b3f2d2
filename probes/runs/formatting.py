"""Rows of tables, and numbers as text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from .finished_run import FinishedRun

Entry = dict[str, Any]  # of results.json, or a row of a table
Rows = list[Entry]


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
    return "".join(c if c.isalnum() or c in ".-" else "_" for c in text)


def bounds(ci95: Sequence[float] | None, prefix: str = "") -> dict[str, Any]:
    """Return the columns of an interval: low and high, both None without one."""
    low, high = (None, None) if ci95 is None else ci95
    return {f"{prefix}low": low, f"{prefix}high": high}


def value_columns(entry: Mapping[str, Any] | None, prefix: str = "") -> dict[str, Any]:
    """Return the columns of {"value", "ci95"}: value, low and high, None without an entry."""
    entry = entry or {"value": None, "ci95": None}
    return {f"{prefix}value": entry["value"]} | bounds(entry["ci95"], prefix)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of equally many cells as lines whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def run_columns(run: FinishedRun) -> dict[str, Any]:
    """Return the columns that tell the runs of a study apart."""
    match = run.metrics["match"]
    random = {} if match == "none" else {"match": match, "draw": run.metrics["draw"]}
    kind = {"untrained": bool(run.metrics["untrained"]), "probes": run.probe_kind}
    return {"image_attention": run.mask} | kind | random


def format_percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction in percent, without the sign %."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def format_score(value: float, ci95: Sequence[float]) -> str:
    """Return a score and its interval in percent, without the sign %: "53.7 [51.2, 56.1]"."""
    low, high = (format_percent(bound) for bound in ci95)
    return f"{format_percent(value)} [{low}, {high}]"


def format_points(value: float | None) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return "–" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def format_p(value: float | None) -> str:
    """Return a p-value with three decimals, or four below 0.01."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}"


def format_interval(ci95: list[float]) -> str:
    """Return an interval in percentage points."""
    return f"[{format_points(ci95[0])}, {format_points(ci95[1])}]"


def format_difference(entry: dict[str, Any]) -> str:
    """Return an entry's value and interval in percentage points, "" without them."""
    missing = entry["value"] is None or entry["ci95"] is None
    return "" if missing else f"{format_points(entry['value'])} {format_interval(entry['ci95'])}"
