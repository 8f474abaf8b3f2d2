"""Figures of the knockout and starvation analyses, and the numbers in their CSV files."""

import csv
import json
from operator import itemgetter

import probe_runs
import pytest
import tiny_models

from probes.analyses.knockout.figures import effects_by_class
from probes.cli import main

MASKS = ("causal", "bidirectional")
KEY = itemgetter("class", "condition", "control")


@pytest.fixture(scope="module")
def runs(checkpoints, tmp_path_factory) -> list[str]:
    """Runs under both masks whose patches are often confused, with every knockout and starvation analysis."""
    root = tiny_models.write_segmentation(
        tmp_path_factory.mktemp("data"), training=4, validation=9, seed=5
    )
    paths = [str(tmp_path_factory.mktemp("study") / mask) for mask in MASKS]
    options = [
        "--controls",
        "distance",
        "matched",
        "--layer-windows",
        "2",
        "--attention",
        "--draws",
        "1",
    ]
    for mask, path in zip(MASKS, paths, strict=True):
        probe_runs.fit(checkpoints[mask], root, path, "--data.batch_size", "2")
        main(["knockout", "--probes", path, "--classes", "auto:3", *options])
    main(["starvation", "--probes", *paths, "--by-class", "--flip"])
    return paths


def rows(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_every_analysis_has_its_figure_and_numbers(runs, tmp_path):
    main(["report", *runs, "--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    table = (tmp_path / "tables.tex").read_text().split(r"\midrule")[3]
    assert table.count(r" \\") == sum(
        len(rows(tmp_path / f"knockout_effects_{m}.csv")) for m in MASKS
    )
    for title in (
        "Wrong patches left",
        "Effects against controls",
        "Effect by layers cut",
        "Attention of wrong patches",
    ):
        assert all(f"{title}, {mask}" in page for mask in MASKS)
    for mask, path in zip(MASKS, runs, strict=True):
        knockout = json.load(open(f"{path}/knockout.json"))
        by_key = {KEY(row): row for row in rows(tmp_path / f"knockout_effects_{mask}.csv")}
        assert len(by_key) == len(knockout["effects"])
        for effect in knockout["effects"]:
            row = by_key[KEY(effect)]
            assert float(row["value"]) == effect["later"]["value"]
            assert float(row["p"]) == effect["later"]["p"]
        by_class = rows(tmp_path / f"knockout_{mask}.csv")
        for entry in knockout["classes"]:
            for condition, remaining in entry["remaining"].items():
                own = [
                    r
                    for r in by_class
                    if (r["class"], r["condition"]) == (entry["class"], condition)
                ]
                assert not own or [float(r["remaining"]) for r in own] == pytest.approx(remaining)
        sweep = json.load(open(f"{path}/knockout_windows.json"))
        written = rows(tmp_path / f"knockout_windows_{mask}.csv")
        assert len(written) == 2 * len(sweep["places"]) * 4  # sets, windows, layers 0..3
    starvation = json.load(open(f"{runs[1]}/starvation.json"))
    by_class = rows(tmp_path / "starvation_by_class.csv")
    assert [float(row["standardised"]) for row in by_class] == starvation["by_class"]["gap"]
    for flip in starvation["flips"]:
        assert f"Position or content? ({flip['flip']})" in page
        assert f"Result: {flip['follows']}." in page
        assert [
            float(row["gap"]) for row in rows(tmp_path / f"starvation_{flip['flip']}.csv")
        ] == flip["gap"]


def test_significant_effects_are_filled():
    """Of all classes by p, of a class by the corrected one; a class that is not tested is hollow."""
    effects = [
        {
            "class": name,
            "condition": condition,
            "control": "none",
            "images": 6,
            "cases": 6,
            "p_corrected": [0.5],
        }
        | {"later": {"value": -0.2, "ci95": [-0.3, -0.1], "p": p, "p_holm": p_holm}}
        for condition in ("incorrect", "correct", "correct - incorrect")
        for name, p, p_holm in (
            ("all", 0.01, None),
            ("a", 0.01, 0.04),
            ("b", 0.04, 0.08),
            ("c", 0.04, None),
        )
    ]
    ax = effects_by_class({"image_attention": "causal", "effects": effects}).figure.axes[0]
    points = [line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [point.get_xdata()[0] for point in points] == [-20] * 4
    assert [point.get_markerfacecolor() == "white" for point in points] == [
        False,
        False,
        True,
        True,
    ]


def test_terminal_says_what_the_file_says(runs, tmp_path, capsys):
    main(
        [
            "knockout",
            "--probes",
            runs[0],
            "--classes",
            *("sky", "wall", "road"),
            "--out",
            str(tmp_path),
        ]
    )
    text = capsys.readouterr().out
    results = json.load((tmp_path / "knockout.json").open())
    (pooled,) = [e for e in results["effects"] if KEY(e) == ("all", "correct", "none")]
    assert f"{pooled['cases']} cases in {pooled['images']} images pooled" in text
    line = next(line for line in text.splitlines() if line.startswith("  correct against none"))
    own = [
        e["later"]["p_holm"]
        for e in results["effects"]
        if (e["condition"], e["control"]) == ("correct", "none")
    ]
    tested = [p for p in own if p is not None]
    assert f"{100 * pooled['later']['value']:+.1f} pp" in line
    assert line.endswith(f"; {sum(p < 0.05 for p in tested)} of {len(tested)} classes")
    few = results["too_few_images"]
    assert (
        f"Not tested, in fewer than 6 images, or groups of images: {', '.join(few)}\n" in text
    ) == bool(few)
