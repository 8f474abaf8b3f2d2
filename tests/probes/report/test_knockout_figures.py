"""Figures of the knockout and starvation analyses, and the numbers in their CSV files."""

import csv
import json
from operator import itemgetter

import probe_runs
import pytest
import tiny_models
from probes.analyses.knockout.inference import knockout_inference
from probes.analyses.knockout.tables import knockout_tables

from probes.analyses.knockout.effects import read_cases
from probes.analyses.knockout.figures import VERDICT_COLOURS, class_effects, knockout_figures
from probes.analyses.knockout.run import OUTCOME_TITLES
from probes.analyses.starvation.figures import starvation_figures
from probes.cli import main
from probes.results.study import read_studies

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
            [
                "knockout",
                "--probes",
                paths[-1],
                "--classes",
                "auto:3",
                "--controls",
                "distance",
                "matched",
                "--fractions",
                "0.5",
            ]
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
    names = lambda analysis: [figure.name for figure in starvation_figures(result, analysis)]
    older = {key: value for key, value in result.items() if key not in ("by_position", "dummy_tokens")}
    further = {"starvation_own_probe", "starvation_dummy_tokens", "starvation_dummy_own_probe"}
    assert set(names(result)) - set(names(older)) == further
    assert names(None) == ["starvation", "starvation_grid"]


@pytest.fixture(scope="module")
def inference_by_mask(runs) -> dict:
    """The inference of both knockouts, with shifts; so small ones have none of their own."""
    study = read_studies(runs)[0]
    inference = {mask: knockout_inference(run) for mask, run in study.trained.items()}
    for of_mask in inference.values():
        names = [row["class"] for row in of_mask["outcomes"]["rate"]["classes"]]
        hide = {names[0]: {"value": 0.2, "ci95": [0.1, 0.3]}, "wall": {"value": 0.1, "ci95": [0.05, 0.2]}}
        shift = {"classes": [names[0], "wall"], "images": 6, "hide": hide, "shift": True, "towards": names[0]}
        of_mask["criterion_shifts"] = [shift, shift | {"shift": False, "towards": None}]
    return inference


def test_tables_have_every_class_mean_and_shift(inference_by_mask):
    tables = knockout_tables(inference_by_mask)
    for mask in MASKS:
        inference = inference_by_mask[mask]
        for outcome, expected in inference["outcomes"].items():
            key = {"image_attention": mask, "outcome": outcome}
            select = lambda name, key=key: [row for row in tables[name] if key.items() <= row.items()]
            assert expected["classes"]
            for row, entry in zip(select("knockout_classes"), expected["classes"], strict=True):
                assert row["value"] == entry["value"] and [row["low"], row["high"]] == entry["ci95"]
            means = {(row["mean_over"], row["effect"]): row for row in select("knockout_means")}
            assert (
                means["pairs", "knockout_correct"]["value"] == expected["mean_over_pairs"]["knockout_correct"]["value"]
            )
            assert means["classes", "knockout_correct"]["value"] == expected["mean"]["knockout_correct"]["value"]
        moves = [row["move_to_first"] for row in tables["knockout_shifts"] if row["image_attention"] == mask]
        assert moves == [0.2, 0.1, 0.2, 0.1]


def test_figures_of_the_inference(runs, inference_by_mask):
    trained = read_studies(runs)[0].trained
    figures = {figure.name: figure for figure in knockout_figures(trained, inference_by_mask)}
    for mask in MASKS:
        inference = inference_by_mask[mask]
        drawn = figures[f"knockout_effects_{mask}"]
        axes = drawn.data.figure.axes
        assert len(axes) == 3 * 3, "outcomes and effects"
        names = {row["class"] for row in inference["outcomes"]["rate"]["classes"]}
        shifted = {name for entry in inference["criterion_shifts"] if entry["shift"] for name in entry["classes"]}
        labels = [label.get_text() for label in axes[0].get_yticklabels()]
        expected = {f"{name} †" if name in shifted else name for name in names}
        assert set(labels) == expected | {"mean over classes", "mean over pairs"}
        assert "†" in drawn.caption and any("†" in label for label in labels)
        assert len(drawn.data.rows) == 3 * 6 * len(names), "also against matched tokens"
        squares = [line for line in axes[0].lines if line.get_marker() == "s"]
        matched = [r for r in inference["outcomes"]["rate"]["classes"] if r["effect"] == "knockout_incorrect_matched"]
        assert len(squares) == len(names) + 2 and {100 * row["value"] for row in matched} <= {
            line.get_xdata()[0] for line in squares
        }
        assert len(figures[f"knockout_shifts_{mask}"].data.rows) == 2 * len(inference["criterion_shifts"])


def test_significant_effects_are_filled_and_coloured_by_their_direction():
    mean = {"value": 0.1, "ci95": [-0.1, 0.3], "verdict": "does not hold"}
    row = {"effect": "knockout_incorrect", "ci95": [-0.3, -0.1], "value": -0.2}
    rows = [
        row | {"class": c, "verdict": v} for c, v in zip("abc", ("holds", "reversed", "does not hold"), strict=True)
    ]
    rows += [r | {"effect": effect} for r in rows for effect in ("knockout_correct", "knockout_specificity")]
    means = dict.fromkeys(("knockout_incorrect", "knockout_correct", "knockout_specificity"), mean)
    outcomes = {"rate": {"classes": rows, "mean": means, "mean_over_pairs": means}}
    inference = {"look_alikes": [["a", "b"], ["c", "b"]], "outcomes": outcomes, "criterion_shifts": None}
    ax = class_effects(inference, rows).figure.axes[0]
    points = [line for line in ax.lines if line.get_marker() in ("o", "D")]
    assert [p.get_xdata()[0] for p in points] == [-20, -20, -20, 10, 10]
    fills = [p.get_markerfacecolor() for p in points]
    assert fills == [VERDICT_COLOURS["holds"], VERDICT_COLOURS["reversed"], "white", "white", "white"]


def test_terminal_says_what_the_inference_says(runs, tmp_path, capsys):
    classes = [entry["class"] for entry in json.load(open(f"{runs[0]}/knockout.json"))["classes"]]
    main(["knockout", "--probes", str(runs[0]), "--classes", *classes, "--out", str(tmp_path)])
    text, run = capsys.readouterr().out, read_studies(runs)[0].trained["causal"]
    pooled = read_cases(run, 1).counts
    assert f"{pooled['cases']} cases in {pooled['images']} images pooled:" in text
    inference = knockout_inference(run, tmp_path)
    few = inference["too_few_images"]
    assert (f"Not tested, in fewer than 6 images, or groups of images: {', '.join(few)}\n" in text) == bool(few)
    for outcome, scale in (("rate", 100), ("log_odds", 1)):
        of_outcome = inference["outcomes"][outcome]
        section = text.partition(OUTCOME_TITLES[outcome])[2]
        for effect, mean in of_outcome["mean"].items():
            line = next(line for line in section.splitlines() if line.startswith(f"  {effect} "))
            assert f"{scale * mean['value']:+.2f} " in line
            held = [row["verdict"] for row in of_outcome["classes"] if row["effect"] == effect].count("holds")
            assert line.endswith(f"holds in {held} of {mean['classes']}")
