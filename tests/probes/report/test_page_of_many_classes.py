"""A page of more than 255 classes shows those that gain and lose most; the CSV has all."""

import json
import re

import probe_runs
import pytest
from pandas import read_csv
from report_parts import CURVE

from probes.cli import main

CLASSES = 1000
ENDS = 20


@pytest.mark.slow
def test_the_classes_of_both_ends_are_shown_and_the_csv_has_all(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    names = [f"class {k}" for k in range(CLASSES)]
    (root / "classes.json").write_text(json.dumps({"classes": names}))
    run = probe_runs.write_run(tmp_path / "study/causal", CURVE, root=root, images=4)
    main(["report", str(run.parent), "--out", str(tmp_path / "report")])
    page = (tmp_path / "report/index.html").read_text()
    section = page.partition('<section id="classes">')[2].partition("</section>")[0]
    shown = re.findall(r'<div class="kclass"><span[^>]*>(class \d+)<', section)
    table = read_csv(tmp_path / "report/classes.csv")
    assert len(table["class"].unique()) == CLASSES
    iou = table.pivot(index="class", columns="site", values="iou")
    best, compared = re.search(r"at (.*?), the best site, and at (.*?):", section).groups()
    site = {
        "the encoder": "encoder",
        "layer 4": "layer_04",
        "the adapter": "adapter",
        "layer 3": "layer_03",
    }
    gain = iou[site[best]] - iou[site[compared]]
    assert len(shown) == 2 * ENDS
    assert gain[shown[:ENDS]].min() >= gain.drop(shown[:ENDS]).max()
    assert gain[shown[ENDS:]].max() <= gain.drop(shown[ENDS:]).min()
    assert f"of {CLASSES} classes" in section and 'href="classes.csv"' in section
