"""The tower's experiment: the rule that its plan fixed, and the rows of its page."""

import csv
import re

import pytest

from experiments.real.tower.page import HERE, conclude, page_lines, read_table, tower_lines

COLUMNS = "study of first second site difference low high finding".split()


@pytest.mark.parametrize(
    ("decides", "second", "expected"),
    [
        (["better", "better"], ["undecided", "better"], "gains"),
        (["better", "better"], ["undecided", "worse"], "undecided"),
        (["worse", "worse"], [], "loses"),
        (["worse"], ["worse", "worse"], "not measured"),
        (["worse", "undecided"], ["worse", "worse"], "undecided"),
        (["no effect", "negligible"], ["worse", "worse"], "keeps"),
        (["better", "worse"], [], "undecided"),
    ],
)
def test_a_mask_gains_or_loses_only_if_both_seeds_show_it(decides, second, expected):
    assert conclude(decides, second) == expected


def test_a_row_has_the_difference_from_the_published_tower(tmp_path):
    rows = [
        ["msrc/encoders", "best layer", "A", "C", "best layer", -0.25, -0.3, -0.2, "worse"],
        ["msrc/encoders", "site", "A", "C", "layer_11", 0.01, -0.02, 0.04, "undecided"],
        ["msrc/encoders", "site", "B", "C", "layer_11", 0.5, 0.4, 0.6, "better"],
    ]
    models = [["msrc/encoders", "A", "published"], ["msrc/encoders", "B", "causal_0"]]
    models += [["msrc/encoders", "C", "bidirectional_0"]]
    tables = {"differences": (COLUMNS, rows), "models": (["study", "key", "name"], models)}
    for name, (columns, content) in tables.items():
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([columns, *content])
    lines = [line for line in tower_lines(tmp_path) if "bidirectional, 0" in line]
    expected = "−25.0 [−30.0, −20.0] worse | +1.0 [−2.0, 4.0] undecided"
    assert lines[0] == f"| msrc | bidirectional, 0 | {expected} |"


def test_the_page_has_the_numbers_of_its_tables():
    page = (HERE / "tower.md").read_text()
    expected = page_lines(HERE)
    assert [line for line in page.splitlines() if line in expected] == expected
    rows = " ".join(expected)
    answer, _, _ = page.partition("## Found")
    intervals = re.findall(r"[+−]?\d+\.\d \[[^\]]+\]", answer)
    assert intervals and all(interval in rows for interval in intervals)
    trained = read_table(HERE, "sites").query("weights == 'trained' and metric == 'miou'")
    published = trained[trained["model"] == "published"]
    for study, best in published.groupby("study")["value"].max().items():
        told = f"({100 * best:.1f}"
        assert told in answer, study
