"""Rows of names and scores, rounded for people -> Markdown and LaTeX (booktabs)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}", "−": "$-$", "–": "--"}
LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


class Score(NamedTuple):
    """A number in a table.

    Args:
        text: Rounded.
        interval: Its 95% interval, "" without one.
        is_best: Whether it is shown to be the best of its column.
    """

    text: str
    interval: str = ""
    is_best: bool = False

    def marked(self, best: str) -> str:
        """Return number and interval, the best number within `best`."""
        text = best.format(self.text) if self.is_best else self.text
        return f"{text} {self.interval}".rstrip()


Row = Mapping[str, str | Score]  # by title of the column


def format_tables(path: Path, rows: Sequence[Row], note: str) -> dict[Path, str]:
    """Return the contents of PATH.md and PATH.tex.

    Args:
        path: Without a suffix.
        rows: Their columns are those of all rows, in order of appearance.
        note: What the table needs to be understood.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [[row.get(title, "") for title in titles] for row in rows]
    lines = [titles, ["---"] * len(titles), *_as_text(cells, best="**{}**")]
    markdown = [f"| {' | '.join(line)} |" for line in lines]
    escape = str.maketrans(LATEX)
    latex = []
    for line in [titles, *_as_text(cells, best="\0{}\1")]:
        escaped = [cell.translate(escape) for cell in line]
        latex.append(" & ".join(escaped).replace("\0", r"\textbf{").replace("\1", "}") + r" \\")
    latex[1:1] = [r"\midrule"]
    columns = "l" * len(titles)
    top = [f"% {note}", r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    return {
        path.with_suffix(".md"): "\n".join([*markdown, "", note, ""]),
        path.with_suffix(".tex"): "\n".join([*top, *latex, r"\bottomrule", r"\end{tabular}", ""]),
    }


def _as_text(cells: Sequence[Sequence[str | Score]], best: str) -> list[list[str]]:
    return [
        [cell.marked(best) if isinstance(cell, Score) else cell for cell in line] for line in cells
    ]
