"""LaTeX tables hold the text of their cells."""

import re

from hypothesis import given
from hypothesis import strategies as st

from probes.report.latex import latex_table

COMMANDS = {
    "textbackslash": "\\",
    "textasciitilde": "~",
    "textasciicircum": "^",
}


def typeset(line: str) -> list[str]:
    """Return the cells of a row as TeX's rules read it: commands, escaped characters, groups, cells."""
    cells = [""]
    rest = line
    while rest:
        token = re.match(
            r"\\(textbackslash|textasciitilde|textasciicircum)\{\}|\\(.)|\$-\$|--|(.)", rest
        )
        command, escaped, character = token.groups()
        assert character not in (*"%#$~^_\\",), f"{character} is not escaped in {line}"
        if character == "&":
            cells.append("")
        elif character not in ("{", "}"):
            cells[-1] += (
                COMMANDS.get(command) or escaped or character or {"$-$": "−", "--": "–"}[token[0]]
            )
        rest = rest[token.end() :]
    return [cell.strip() for cell in cells]


@given(st.lists(st.text("ab−–[]*&%$#_{}~^\\", min_size=1), min_size=2, max_size=4))
def test_cells_are_typeset_as_they_are(cells):
    text = latex_table([["name", "x"], cells], names=1)
    assert text.startswith("\\begin{tabular}{lr}\n\\toprule\nname & x \\\\\n\\midrule\n")
    row = text.split("\n")[4]
    assert row.endswith(r" \\")
    assert not row.startswith(("[", "*"))
    assert typeset(row.removesuffix(r" \\")) == cells
