"""The causal analyses on the page: their figures, the numbers behind them, and TensorBoard's copy."""

import csv
import json

import pytest
import tiny_models
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from probes.analyses.knockout.effects import read_cases
from probes.cli import main
from probes.report.figures.knockout_entries import causal_pictures, where_claims_are_read
from probes.report.study import studies_of


@pytest.fixture(scope="module")
def runs(checkpoints, tmp_path_factory) -> list[str]:
    """Runs under both masks whose patches are often confused, with every causal analysis."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5)
    paths = []
    for mask in ("causal", "bidirectional"):
        paths.append(str(tmp_path_factory.mktemp("study") / mask))
        main(
            ["fit", "-c", "configs/demo/probes.yaml", "--out", paths[-1], "--trainer.max_epochs", "1"]
            + ["--model.mllm", str(checkpoints[mask]), "--data.root", str(root), "--data.batch_size", "2"]
        )
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
    main(["report", *runs, "--out", str(tmp_path), "--tensorboard"])
    page = (tmp_path / "index.html").read_text()
    for mask, path in zip(("causal", "bidirectional"), runs, strict=True):
        for kind in ("controls", "doses", "windows", "heads"):
            assert (tmp_path / f"knockout_{kind}_{mask}.png").stat().st_size > 0
        for title in ("Against controls", "Dose and response", "Which layers correct", "Where wrong patches look"):
            assert f"{title}, {mask}" in page
        facts = json.load(open(f"{path}/knockout.json"))
        found = {
            (r["class"], r["condition"], r["control"]): r for r in rows(tmp_path / f"knockout_controls_{mask}.csv")
        }
        assert len(found) == len(facts["effects"])
        for effect in facts["effects"]:
            row = found[effect["class"], effect["condition"], effect["control"]]
            assert float(row["value"]) == effect["later"]["value"] and float(row["p"]) == effect["later"]["p"]
        swept = json.load(open(f"{path}/knockout_windows.json"))
        windows = [place for place in swept["places"] if place["kind"] != "head"]
        assert (
            len(rows(tmp_path / f"knockout_windows_{mask}.csv")) == 2 * len(windows) * 4
        )  # sets, windows, layers 0..3
        assert len(rows(tmp_path / f"knockout_heads_{mask}.csv")) == 2 * 3 * 4
    for turned in json.load(open(f"{runs[1]}/starvation.json"))["flips"]:
        assert f"Position or content? ({turned['flip']})" in page
        assert f"Here it follows {turned['follows']}" in " ".join(page.split())
        assert [float(row["gap"]) for row in rows(tmp_path / f"starvation_{turned['flip']}.csv")] == turned["gap"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {tag.rpartition("/")[2] for tag in events.Tags()["images"]}
    assert shown == {path.stem for path in tmp_path.glob("*.png")}, "the same figures"


def test_effects_are_shown_on_the_images_in_which_claims_are_read(runs, monkeypatch):
    run = studies_of(runs)[0].trained["causal"]
    facts = json.load(open(f"{runs[0]}/knockout.json"))
    monkeypatch.setattr("probes.report.figures.knockout_entries.confused_patches", lambda run: 2)
    shown = where_claims_are_read(run, facts)
    cases = read_cases(run, 2)
    assert shown["min_patches"] == 2 and len(cases.images) < len(read_cases(run, 1).images)
    (entry,) = [e for e in shown["effects"] if (e["class"], e["condition"], e["control"]) == ("all", "correct", "none")]
    effect = cases.rates["correct"] - cases.rates["none"]
    assert entry["mean"] == pytest.approx(effect.double().mean(0).tolist())
    monkeypatch.setattr("probes.report.figures.knockout_entries.confused_patches", lambda run: 5)  # of four patches
    assert where_claims_are_read(run, facts) == facts


def test_runs_without_them_have_no_such_figures(runs, tmp_path, monkeypatch):
    (study,) = studies_of(runs)
    monkeypatch.setattr("probes.results.probe_run.ProbeRun.analysis", lambda run, name: None)
    assert not list(causal_pictures(study))
