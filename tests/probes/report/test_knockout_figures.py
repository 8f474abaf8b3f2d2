"""Figures of the knockout and starvation analyses, and the numbers in their CSV files."""

import csv
import json
from operator import itemgetter

import probe_runs
import pytest
import tiny_models

from probes.analyses.knockout.effects import read_cases
from probes.cli import main
from probes.report.claims import restrict_to_claims
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
    main(["starvation", "--probes", *paths, "--by-class", "--flip"])
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
    for flip in json.load(open(f"{runs[1]}/starvation.json"))["flips"]:
        assert f"Position or content? ({flip['flip']})" in page and f"Result: {flip['follows']}." in page
        assert [float(row["gap"]) for row in rows(tmp_path / f"starvation_{flip['flip']}.csv")] == flip["gap"]


def test_effects_are_restricted_to_the_images_of_the_claims(runs, monkeypatch):
    run = read_studies(runs)[0].trained["causal"]
    knockout = json.load(open(f"{runs[0]}/knockout.json"))
    monkeypatch.setattr("probes.report.claims.min_confused_patches", lambda run: 2)
    restricted = restrict_to_claims(run, knockout)
    cases = read_cases(run, 2)
    assert restricted["min_patches"] == 2 and len(cases.images) < len(read_cases(run, 1).images)
    (entry,) = [e for e in restricted["effects"] if KEY(e) == ("all", "correct", "none")]
    effect = cases.rates["correct"] - cases.rates["none"]
    assert entry["mean"] == pytest.approx(effect.double().mean(0).tolist())
    monkeypatch.setattr("probes.report.claims.min_confused_patches", lambda run: 5)  # of four patches
    assert restrict_to_claims(run, knockout) == knockout
