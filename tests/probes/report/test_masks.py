"""Any number of masks of a model: each is compared with the first, by name."""

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import probe_runs
import pytest
import tiny_models
from report_parts import CURVE, studies_of

from probes.analyses.starvation.starvation_section import section
from probes.cli import main
from probes.report.claims import evaluate_claims
from probes.report.compare import difference_rows
from probes.report.terminal import _rows_of_claims
from probes.runs.read import ProbeRun
from probes.tasks import SEGMENTATION

MASKS = ("causal", "bidirectional", "prefix", "rows")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A solved run under each mask; that of rows was planted, as its checkpoint says of what `probes plant` knows."""
    root = tiny_models.write_segmentation(tmp_path_factory.mktemp("data"), 1, 1)
    (root / "truth.json").write_text(json.dumps({"starvation": "planted"}))
    folder = tmp_path_factory.mktemp("study")
    for i, mask in enumerate(MASKS):
        quality = [x + 0.05 * i for x in CURVE]
        probe_runs.write_solved(folder / mask, quality, seed=i, mask=mask, root=root)
    return {mask: folder / mask for mask in MASKS}


def gaps(paths) -> dict[str, dict]:
    """Return the claims of starvation that a report of these runs has, by their texts."""
    claims = evaluate_claims(*studies_of(paths))
    return {claim["text"]: claim for claim in claims if claim["claim"] == "starvation"}


def test_each_mask_is_compared_with_the_first_as_the_two_alone_are(runs):
    together = gaps(runs.values())
    assert len(together) == len(MASKS) - 1
    for second in MASKS[1:]:
        ((text, alone),) = gaps([runs["causal"], runs[second]]).items()
        assert text == f"First patch starves under causal attention: {second} − causal, accuracy"
        for key in ("value", "ci95", "image_attention"):
            assert together[text][key] == alone[key]


def test_the_first_of_other_masks_is_compared_too(runs):
    ((text, claim),) = gaps([runs["prefix"], runs["rows"]]).items()
    assert text.endswith("under prefix attention: rows − prefix, accuracy")
    site = ProbeRun(runs["prefix"]).peak_layer
    first, second = (ProbeRun(runs[mask]) for mask in ("prefix", "rows"))
    effects = [run.effects[f"patch_0@{site}"] for run in (first, second)]
    assert claim["value"] == pytest.approx(effects[1].value - effects[0].value)


def test_what_is_known_of_the_papers_masks_is_not_said_of_others(runs):
    """A planted model's starvation is bidirectional minus causal; a block of its own may read less, too."""
    known = [text for text, claim in gaps(runs.values()).items() if claim.get("truth")]
    assert len(known) == 1 and "bidirectional − causal" in known[0]


def test_differences_are_those_of_each_pair(runs):
    studies = studies_of(runs.values())
    rows = [row for row in difference_rows(studies, {studies[0].name: "A"}) if row["of"] == "site"]
    site = [row for row in rows if row["name"] == "layer_03"]
    assert [(row["first"], row["second"]) for row in site] == [("causal", x) for x in MASKS[1:]]
    scores = {mask: ProbeRun(path).site_scores["layer_03"].value for mask, path in runs.items()}
    for row in site:
        assert row["difference"] == pytest.approx(scores[row["second"]] - scores["causal"])


def test_results_of_starvation_are_those_of_each_pair(runs):
    (study,) = studies_of(runs.values())
    result = section(study).results["starvation"]
    of_pairs = [{key: x for key, x in result.items() if key != "further"}, *result["further"]]
    for second, of_pair in zip(MASKS[1:], of_pairs, strict=True):
        (pair,) = studies_of([runs["causal"], runs[second]])
        assert of_pair == section(pair).results["starvation"]
        assert {"causal", second} <= of_pair.keys()
    names = [figure.name for figure in section(study).figures]
    assert len(names) == len({*names}), "figures have files of their own"


def test_page_and_tables_name_masks_without_a_sign(runs, tmp_path):
    main(["report", str(runs["rows"].parent), "--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    assert "rows, dotted" in page and "causal, dashed" in page
    labels = [f">{mask} " for mask in ("◣", "■", "prefix", "rows")]  # at the best sites
    assert all(page.count(label) for label in labels)
    claims = pd.read_csv(tmp_path / "claims.csv")
    facts = {*claims.loc[claims["claim"] == "starvation", "what"]}
    assert facts == {f"{mask} − causal, accuracy" for mask in MASKS[1:]}
    differences = pd.read_csv(tmp_path / "differences.csv")
    of_sites = differences[differences["of"] == "site"]
    pairs = {*zip(of_sites["first"], of_sites["second"], strict=True)}
    assert pairs == {("causal", mask) for mask in MASKS[1:]}
    assert (tmp_path / "starvation_rows.csv").is_file()


def test_terminal_has_a_row_for_each_mask(runs, tmp_path, capsys):
    main(["report", str(runs["rows"].parent), "--out", str(tmp_path / "report")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("some ")]
    assert [row[1] for row in rows if row[1] in MASKS and row[3] == "of"] == [*MASKS]
    assert max(len(line) for line in lines if line.startswith("some ")) <= 80


def test_rows_of_claims_between_masks_say_of_which():
    """Both rows said "causal": the mask that all are compared with."""
    row = dict.fromkeys(["value_text", "value_ci", "beyond_value_text", "beyond_value_ci"], "")
    row |= {"title": "First patch starves", "model": "A", "mask": "causal", "task": SEGMENTATION}
    row |= {"finding": "no effect", "beyond_random_verdict": "untested"}
    tested = pd.DataFrame([row | {"what": f"{mask} − causal, accuracy"} for mask in MASKS[1:]])
    view = SimpleNamespace(names={"A": SimpleNamespace(letter="A")}, masks=MASKS)
    _, *lines = _rows_of_claims(view, tested, room=9)
    for mask, line in zip(MASKS[1:], lines, strict=True):
        assert f"A {mask} − causal First patch" in line
