"""One table over models: who is bold, and benchmarks that belong to the weights that were read."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from report_parts import CURVE

from llava_bidir.common.files import write_files
from probes.cli import main
from probes.report.model_table import fingerprint

WORSE = [x - 0.1 for x in CURVE]


def report(runs: Path, *words: str) -> list[list[str]]:
    """Return the cells of summary.md of a report, in RUNS/out."""
    out = runs / "out"
    main(["report", str(runs), *words, "--out", str(out)])
    table = (out / "summary.md").read_text()
    cells = []
    for line in table.splitlines():
        if line.startswith("|"):
            line = line.strip("| ")
            cells.append(line.split(" | "))
    return cells


def test_a_row_for_each_model_rounded_as_the_page_and_bold_where_shown_best(write, tmp_path):
    for i, (name, quality) in enumerate({"bad": WORSE, "good": CURVE}.items()):
        write(name, quality, i, mllm=name)
    titles, _, bad, good = report(tmp_path)
    with (tmp_path / "out/summary.csv").open() as file:
        rows = [*csv.DictReader(file)]
    for cells, row in zip((bad, good), rows, strict=True):
        value, low, high = (100 * float(row[f"mIoU{end}"]) for end in ("", "_low", "_high"))
        text = f"{value:.1f}"
        if cells is good:
            text = f"**{text}**"
        assert cells[titles.index("mIoU")] == f"{text} [{low:.1f}, {high:.1f}]"
    assert "mask" not in titles, "all have the same"
    latex = (tmp_path / "out/summary.tex").read_text()
    assert latex.count(r"\textbf{") == 1 and r"\begin{tabular}" in latex


def test_none_is_bold_among_equal_models_and_a_single_one_has_no_table(write, tmp_path):
    runs = [Path(write(name, CURVE, i, mllm=name)) for i, name in enumerate("ab")]
    rows = report(tmp_path)
    assert not any("**" in cell for row in rows for cell in row)
    shutil.rmtree(runs[1])
    main(["report", str(tmp_path), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out/summary.md").exists()


def test_benchmarks_are_those_of_the_same_weights(write, tmp_path):
    write("first", CURVE, mllm="first")
    second = Path(write("second", CURVE, 1, mllm="second"))
    manifest = json.loads((second / "manifest.json").read_text())
    manifest["identity"]["model"] = {"mllm/model.safetensors": "ab12"}
    write_files({second / "manifest.json": manifest})
    about = {"encoder": "clip", "image_attention": "causal"}
    row = about | {"column": "GQA", "value": 0.625, "low": 0.61, "high": 0.64}
    points = about | {"column": "MME-P", "value": 1500.4, "low": 1480.0, "high": 1520.6}
    difference = row | {"image_attention": "bidirectional - causal"}
    weights = about | {"fingerprint": fingerprint({"model.safetensors": "ab12"})}
    file = tmp_path / "table1.json"
    write_files({file: {"models": [weights], "rows": [row, points, difference]}})
    titles, _, *rows = report(tmp_path, "--table1", str(file))
    cells = [dict(zip(titles, row, strict=False)) for row in rows]
    assert [row.get("GQA", "") for row in cells] == ["", "62.5 [61.0, 64.0]"]
    assert cells[1]["MME-P"] == "1500 [1480, 1521]"
    write_files({file: {"models": [weights, weights | {"fingerprint": "other"}], "rows": [row]}})
    with pytest.raises(SystemExit, match="two models of clip, causal"):
        report(tmp_path, "--table1", str(file))
