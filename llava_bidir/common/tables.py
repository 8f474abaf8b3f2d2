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
        text = self.text
        if self.is_best:
            text = best.format(text)
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
    markdown = [titles, ["---"] * len(titles), *_cells(rows, titles, best="**{}**")]
    lines = [f"| {' | '.join(line)} |" for line in markdown]
    columns = "l" * len(titles)
    escape = str.maketrans(LATEX)
    latex = []
    for line in [titles, *_cells(rows, titles, best="\0{}\1")]:
        text = " & ".join(cell.translate(escape) for cell in line)
        marked = text.replace("\0", r"\textbf{").replace("\1", "}")
        latex.append(marked + r" \\")
    head, *body = latex
    tabular = [
        f"% {note}",
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]
    return {
        path.with_suffix(".md"): "\n".join([*lines, "", note, ""]),
        path.with_suffix(".tex"): "\n".join(tabular),
    }


def _cells(rows: Sequence[Row], titles: list[str], best: str) -> list[list[str]]:
    """Return the texts of all rows by column."""
    lines = []
    for row in rows:
        cells = [row.get(title, "") for title in titles]
        texts = [cell.marked(best) if isinstance(cell, Score) else cell for cell in cells]
        lines.append(texts)
    return lines
