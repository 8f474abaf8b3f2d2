"""Figures of the knockout and starvation analyses, and the numbers in their CSV files."""

import csv
import json
import re
from operator import itemgetter

import probe_runs
import pytest
import tiny_models

from probes.analyses.knockout.effects import read_cases, restrict_to_claims
from probes.cli import main
from probes.report.figures.catalogue import _starvation_figures
from probes.report.study import read_studies

MASKS = ("causal", "bidirectional")
KEY = itemgetter("class", "condition", "control")


@pytest.fixture(scope="module")
def runs(checkpoints, tmp_path_factory) -> list[str]:
    """Runs under both masks whose patches are often confused, with every knockout and starvation analysis."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5)
    paths = []
    for mask in ("causal", "bidirectional"):
        paths.append(str(tmp_path_factory.mktemp("study") / mask))
        probe_runs.fit(checkpoints[mask], root, paths[-1], "--data.batch_size", "2")
        main(
            ["knockout", "--probes", paths[-1], "--classes", "auto:3", "--controls", "distance", "--fractions", "0.5"]
            + ["--layer-windows", "2", "--attention-heads", "--attention", "--draws", "1"]
        )
    main(["starvation", "--probes", *paths, "--by-class", "--flip", "--own-probe", "--dummy-tokens", "1"])
    return paths


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_every_analysis_has_its_figure_and_numbers(runs, tmp_path):
    main(["report", *runs, "--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    table = (tmp_path / "tables.tex").read_text().split(r"\midrule")[3]
    assert table.count(r" \\") == sum(len(rows(tmp_path / f"knockout_controls_{m}.csv")) for m in MASKS)
    for mask, path in zip(MASKS, runs, strict=True):
        for kind in ("controls", "doses", "windows", "heads"):
            assert (tmp_path / f"knockout_{kind}_{mask}.png").stat().st_size > 0
        titles = (
            "Effects against controls",
            "Effect by share of",
            "Effect by layers cut",
            "Attention of wrong patches",
        )
        assert all(title in page for title in titles)
        effects = json.load(open(f"{path}/knockout.json"))["effects"]
        by_key = {KEY(row): row for row in rows(tmp_path / f"knockout_controls_{mask}.csv")}
        assert len(by_key) == len(effects)
        for effect in effects:
            row = by_key[KEY(effect)]
            assert float(row["value"]) == effect["later"]["value"] and float(row["p"]) == effect["later"]["p"]
        sweep = json.load(open(f"{path}/knockout_windows.json"))
        windows = [place for place in sweep["places"] if place["kind"] != "head"]
        written = rows(tmp_path / f"knockout_windows_{mask}.csv")
        assert len(written) == 2 * len(windows) * 4  # sets, windows, layers 0..3
        assert len(rows(tmp_path / f"knockout_heads_{mask}.csv")) == 2 * 3 * 4
    starvation = json.load(open(f"{runs[1]}/starvation.json"))
    own = rows(tmp_path / "starvation_own_probe.csv")
    assert [row["site"] for row in own] == [e["site"] for e in starvation["by_position"]["sites"] for _ in range(4)]
    for entry, part in zip(starvation["by_position"]["sites"], (own[:4], own[4:]), strict=True):
        for name in ("shared", "own", "read_out"):
            assert [float(row[f"{name}_gap"]) for row in part] == entry[name]["gap"]
            assert [float(row[f"{name}_gap_low"]) for row in part] == [low for low, _ in entry[name]["gap_ci95"]]
    with_tokens = [float(row["with_tokens"]) for row in rows(tmp_path / "starvation_dummy_tokens.csv")]
    assert with_tokens == starvation["dummy_tokens"]["gap"]
    change = starvation["dummy_tokens"]["change"]["causal"]["patch_0"]["value"]
    assert "before the image (number: 1)" in page and f"at patch 0: causal {100 * change:+.1f}" in page
    for flip in starvation["flips"]:
        assert f"Position or content? ({flip['flip']})" in page and f"Result: {flip['follows']}." in page
        assert [float(row["gap"]) for row in rows(tmp_path / f"starvation_{flip['flip']}.csv")] == flip["gap"]


def test_starvation_of_an_older_version_has_its_figures(runs):
    """Its starvation.json has neither probes by position nor dummy tokens."""
    result = json.load(open(f"{runs[1]}/starvation.json"))
    names = lambda analysis: [figure.name for figure in _starvation_figures(result, analysis)]
    older = {key: value for key, value in result.items() if key not in ("by_position", "dummy_tokens")}
    further = {"starvation_own_probe", "starvation_dummy_tokens", "starvation_dummy_own_probe"}
    assert set(names(result)) - set(names(older)) == further
    assert names(None) == ["starvation", "starvation_grid"]


def test_effects_are_restricted_to_the_images_of_the_claims(runs, monkeypatch):
    run = read_studies(runs)[0].trained["causal"]
    knockout = json.load(open(f"{runs[0]}/knockout.json"))
    monkeypatch.setattr("probes.analyses.knockout.effects.min_confused_patches", lambda run: 2)
    restricted = restrict_to_claims(run, knockout)
    cases = read_cases(run, 2)
    assert restricted["min_patches"] == 2 and len(cases.images) < len(read_cases(run, 1).images)
    (entry,) = [e for e in restricted["effects"] if KEY(e) == ("all", "correct", "none")]
    effect = cases.rates["correct"] - cases.rates["none"]
    assert entry["mean"] == pytest.approx(effect.double().mean(0).tolist())
    monkeypatch.setattr("probes.analyses.knockout.effects.min_confused_patches", lambda run: 5)  # of four patches
    assert restrict_to_claims(run, knockout) == knockout


def test_terminal_and_report_say_the_same_of_the_same_images(runs, tmp_path, capsys, monkeypatch):
    """Images with few wrong patches count for the analysis, but not for the claims: each number has its N."""
    monkeypatch.setattr("probes.analyses.knockout.effects.CONFUSED_SHARE", 1 / 2)  # 2 of 4 patches
    classes = [entry["class"] for entry in json.load(open(f"{runs[0]}/knockout.json"))["classes"]]
    main(["knockout", "--probes", str(runs[0]), "--classes", *classes, "--out", str(tmp_path)])
    everything, _, claimed = capsys.readouterr().out.partition("images with 2 or more wrong patches, as in the claims")
    main(["report", *map(str, runs), "--out", str(tmp_path / "report")])
    reported = capsys.readouterr().out
    counts = [read_cases(read_studies(runs)[0].trained["causal"], least).counts for least in (1, 2)]
    for text, count in zip((everything, claimed), counts, strict=True):
        assert f"({count['cases']} cases in {count['images']} images):" in text
    for claim in ("incorrect", "correct"):
        (line,) = [line for line in reported.splitlines() if line.startswith(f"knockout_{claim} ") and "causal" in line]
        value, low, high = re.findall(r"[+−][\d.]+", line)[:3]
        row = next(line for line in claimed.splitlines() if line.split()[:3] == [claim, "against", "none"])
        assert re.findall(r"[+-][\d.]+", row)[:3] == [x.replace("−", "-") for x in (value, low, high)]
        assert f"({counts[1]['cases']} cases)" in line
    page = (tmp_path / "report/index.html").read_text()
    assert f">{counts[1]['cases']} cases<" in page and ">9 images<" in page
