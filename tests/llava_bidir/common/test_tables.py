"""Markdown and LaTeX of a table: every cell is there once, whatever its text has, and the best one is bold."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llava_bidir.common.tables import LATEX, Score, format_tables

words = (
    st.text(st.sampled_from("ab 1.−–&%$#_{}\\~^"), min_size=1, max_size=8)
    .map(str.strip)
    .filter(len)
)
scores = st.builds(Score, words, words, st.booleans())


def unescaped(text: str) -> str:
    """Return the text of LaTeX, sign by sign."""
    signs = {code: sign for sign, code in LATEX.items()}
    codes = "|".join(map(re.escape, sorted(signs, key=len, reverse=True)))
    return re.sub(codes, lambda code: signs[code[0]], text)


@given(st.lists(st.tuples(words, scores), min_size=1, max_size=4))
def test_latex_has_each_cell_and_marks_the_best(lines):
    rows = [{"model": name, "GQA_1": score} for name, score in lines]
    text = format_tables(Path("t"), rows, note="n")[Path("t.tex")]
    body = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0].splitlines()
    assert text.count("\\toprule") == 1 and "model & GQA\\_1 \\\\" in text
    for line, (name, score) in zip(body, lines, strict=True):
        first, second = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"), maxsplit=1)
        assert unescaped(first) == name
        plain = second
        if score.is_best:
            escaped = score.text.translate(str.maketrans(LATEX))
            assert second.startswith(rf"\textbf{{{escaped}}} ")
            plain = second.replace(rf"\textbf{{{escaped}}}", escaped, 1)
        assert unescaped(plain) == f"{score.text} {score.interval}"


def test_markdown_has_all_columns_and_the_note():
    rows = [
        {"a": "x", "b": Score("1.0", "[0.5, 1.5]", is_best=True)},
        {"a": "y", "c": Score("2.0")},
    ]
    lines = format_tables(Path("t"), rows, note="Scores.")[Path("t.md")].splitlines()
    assert lines[0] == "| a | b | c |"
    assert lines[2:] == ["| x | **1.0** [0.5, 1.5] |  |", "| y |  | 2.0 |", "", "Scores."]
