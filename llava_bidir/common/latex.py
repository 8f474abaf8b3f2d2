"""Tables in LaTeX."""

from collections.abc import Sequence

SPECIAL = {character: "\\" + character for character in "_%&#${}"}
SPECIAL |= {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
# at the start of a row they would be options of the previous one
SPECIAL |= {"[": "{[}", "*": "{*}"}
ESCAPES = str.maketrans(
    SPECIAL
    | {
        "−": "$-$",
        "–": "--",
        "\n": " ",
    }
)


def latex_table(rows: Sequence[Sequence[str]], names: int) -> str:
    """Return a tabular for the booktabs package.

    Args:
        rows: Cells of plain text; the first row is the header.
        names: Number of columns that hold names, which are aligned on the left; numbers are aligned on the right.
    """
    header, *body = (" & ".join(cell.translate(ESCAPES) for cell in row) + r" \\" for row in rows)
    head = rf"\begin{{tabular}}{{{'l' * names}{'r' * (len(rows[0]) - names)}}}"
    return "\n".join(
        [head, r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", ""]
    )
