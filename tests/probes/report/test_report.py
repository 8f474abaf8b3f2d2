"""Compare claims with numpy, and build the page from tiny runs."""

import re
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import reference
from probe_runs import read_masks
from report_parts import studies_of

from probes.analyses.starvation.starvation_section import starvation
from probes.cli import main
from probes.report.claims import evaluate_claims
from probes.runs.read import ProbeRun

MASKS = ("causal", "bidirectional")
DRAWS_PICTURES = True


@pytest.fixture(scope="module")
def runs(checkpoints, segmentation, tmp_path_factory) -> dict[str, str]:
    """Runs of both masks and an untrained one, and maps of the first."""
    root = tmp_path_factory.mktemp("study")
    untrained = ["--model.untrained", "[adapter, llm]"]
    for name, more in (("causal", []), ("bidirectional", []), ("untrained", untrained)):
        options = ["--save_predictions", "true", *more]
        checkpoint = checkpoints["causal" if more else name]
        probe_runs.fit(checkpoint, segmentation, root / name, *options)
    main(f"maps --probes {root / 'causal'} --image 0 1".split())
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    main(f"report {Path(runs['causal']).parent} --out {out}".split())
    return out


def test_claims_equal_numpy_on_saved_predictions(runs, segmentation):
    targets = read_masks(segmentation / "annotations/validation")
    judged = evaluate_claims(*studies_of(runs.values()))
    claims = {(claim["claim"], claim["image_attention"]): claim for claim in judged}
    gains = {}
    for name, path in runs.items():
        miou = {}
        for site in ProbeRun(path).sites:
            predictions = read_masks(Path(path) / "predictions" / site)
            miou[site] = reference.scores(predictions, targets, 3)[0]
        best = max(miou[f"layer_{layer:02d}"] for layer in (1, 2, 3))
        gains[name] = best - miou["adapter"]
        if name != "untrained":
            drop = miou["encoder"] - miou["adapter"]
            assert claims["adapter_drop", name]["value"] == pytest.approx(drop)
            assert claims["recovery", name]["value"] == pytest.approx(gains[name])
    control = claims["recovery", "causal"]["control"]["value"]
    assert control == pytest.approx(gains["untrained"])
    learned = claims["recovery_trained", "causal"]["value"]
    assert learned == pytest.approx(gains["causal"] - gains["untrained"])


def test_starvation_equals_numpy_on_saved_predictions(runs, segmentation):
    result = starvation(*(ProbeRun(runs[mask]) for mask in MASKS))
    targets = np.stack(read_masks(segmentation / "annotations/validation"))
    for mask in MASKS:
        predictions = np.stack(read_masks(Path(runs[mask]) / "predictions" / result["site"]))
        valid = targets != 255
        right = (predictions == targets) & valid
        # of 24 x 20 pixels in 2 x 2 patches
        right, valid = (x.reshape(-1, 2, 12, 2, 10).sum((0, 2, 4)) for x in (right, valid))
        np.testing.assert_allclose(result[mask], (right / valid).ravel())
        assert result["first_row"][mask] == pytest.approx(right[0].sum() / valid[0].sum())
    gap = np.subtract(result["bidirectional"], result["causal"])
    assert result["gap"] == pytest.approx(gap.tolist())
    ends = np.array(result["gap_ci95"])
    assert (ends[:, 0] <= gap).all() and (gap <= ends[:, 1]).all()


def test_page_is_self_contained(page):
    html = (page / "index.html").read_text()
    assert not re.search(r"src=\"(?!data:)", html)
    assert not re.search("https?:|<script|@font-face|@import", html)
    links = re.findall(r"href=\"([^#\"][^\"]*)\"", html)
    assert len(links) >= 10 and all((page / name).is_file() for name in links)
    anchors = re.findall(r"href=\"#(.*?)\"", html)
    ids = re.findall(r" id=\"(.*?)\"", html)
    assert {*anchors} <= {*ids}
    assert len(ids) == len({*ids})
    for name in ("layers", "starvation", "maps_causal"):
        for kind in ("pdf", "png"):
            assert (page / f"{name}.{kind}").stat().st_size > 1000
    assert len(html) < 400_000


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_fits_its_screen(chromium, page, width, scheme):
    tab = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.goto((page / "index.html").as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("svg.fig >> visible=true").first.bounding_box()["y"] < 700, "first screen"
    visible = "wide" if width == 1280 else "narrow"
    assert tab.locator(f"svg.{visible}").first.is_visible()
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 23)"
    assert dark == (scheme == "dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(15, 19, 23)"
    tab.close()


def test_runs_that_do_not_belong_together_are_rejected(runs, segmentation, tmp_path):
    with pytest.raises(ValueError, match="only untrained controls were passed for"):
        studies_of([runs["untrained"]])
    for folder in (segmentation,):
        with pytest.raises(SystemExit, match="is no study: expected a folder that holds finished"):
            main(f"report {folder} --out {tmp_path / 'none'}".split())
