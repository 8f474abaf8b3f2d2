"""The tables of a report: names of models, claims in one row each, and the summary for the terminal."""

import io
import json
import sys
from itertools import product
from pathlib import Path

import pytest
from report_parts import CURVE, FLAT

from probes.cli import main
from probes.report.page import write_report
from probes.report.tables import shorten_labels
from probes.report.terminal import print_summary

LONG = "a model whose name is far too long for a column"


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["llava-hf/llava-1.5-7b-hf"], ["llava-1.5-7b"]),
        (["runs/demo/causal/stage2/hf"], ["stage2"]),
        (["mine.py:build", "dinov2s"], ["build", "dinov2s"]),
        (["clip + vicuna-7b", "siglip + vicuna-7b"], ["clip", "siglip"]),
        (["vit_small_patch14_dinov2.lvd142m"], ["vit small…"]),
        (["org/vit-small-patch14-142m"], ["vit-small-p…142m"]),
    ],
)
def test_labels_are_short_and_tell_models_apart(names, labels):
    assert shorten_labels(names) == labels
    assert max(map(len, labels)) <= 16


def test_the_summary_has_at_most_20_lines_of_80_columns(write, tmp_path, capsys):
    """Of five models under both masks, more than there is room for; two have verdicts."""
    for i, mask in product(range(5), ("causal", "bidirectional")):
        write(f"{i}", CURVE, i, mask=mask, solved=i < 2, mllm=f"{i} {LONG}")
    main(["report", str(tmp_path), "--out", str(tmp_path / "report")])
    lines = json.loads((tmp_path / "report/results.json").read_text())["summary"]
    assert len(lines) <= 20 and max(map(len, lines)) <= 80
    assert "reads best" in lines[0]
    assert any("more models and masks" in line for line in lines)
    printed = capsys.readouterr().out.splitlines()
    assert printed[: len(lines)] == lines
    assert printed[-2].endswith("report/index.html") and "probes lab" in printed[-1]


def test_the_summary_says_untested_where_the_page_does(write, draws, tmp_path):
    """Beyond one kind of random LLMs alone there is a number, but no verdict."""
    write("trained", FLAT, solved=True)
    draws(FLAT, FLAT, matches=("update",))
    main(["report", str(tmp_path), "--out", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report/results.json").read_text())
    claims = {claim["claim"]: claim for claim in results["claims"]}
    beyond = claims["recovery"]["verdicts"]["beyond_random"]
    assert beyond["verdict"] == "untested" and beyond["value"] is not None
    (line,) = (line for line in results["summary"] if line.startswith("◔ Recovered in the LLM"))
    assert line.endswith(" untested")


@pytest.mark.parametrize("label", ["", "A="])
def test_steps_without_a_result_are_named_whatever_the_folder_is_called(label, write, tmp_path):
    study = tmp_path / "lr=1e-3"
    (study / "steps").mkdir(parents=True)
    write("trained", CURVE, solved=True)
    (tmp_path / "causal_trained").rename(study / "trained")
    for i, key in enumerate(("failed", "left_out")):
        step = {"step": f"trained/{i}", "kind": "knockout", "config": {}, "inputs": {}}
        record = step | {"result": None, "seconds": 0.0, key: "no memory"}
        (study / f"steps/{i}.json").write_text(json.dumps(record))
    results = write_report([f"{label}{study}"], tmp_path / "report")
    assert [step["outcome"] for step in results["unfinished"]] == ["failed", "left out"]
    page = (tmp_path / "report/index.html").read_text()
    assert all(f"trained/{i}" in page for i in range(2))


@pytest.mark.parametrize(
    ("encoding", "no_colour", "printed"),
    [
        ("utf-8", "", "\033[32m●\033[0m supported ■\n○ none −1.0\n"),
        ("utf-8", "1", "● supported ■\n○ none −1.0\n"),
        ("ascii", "", "? supported ?\n? none ?1.0\n"),
    ],
)
def test_signs_are_those_that_the_terminal_can_show(encoding, no_colour, printed, monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("NO_COLOR", no_colour)
    print_summary(["● supported ■", "○ none −1.0", "40 photos."], Path("index.html"))
    stream.flush()
    assert raw.getvalue().decode(encoding) == f"{printed}40 photos.\nNext:  open index.html\n"
