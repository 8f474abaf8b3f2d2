"""Compare claims with numpy, and build the page from tiny runs."""

import re
from pathlib import Path

import numpy as np
import probe_runs
import pytest
import reference
from probe_runs import read_masks
from report_parts import studies_of
from task_runs import write_depth_run

from probes.analyses.starvation.section import starvation
from probes.cli import main
from probes.report.claims import evaluate_claims
from probes.runs.read import ProbeRun

MASKS = ("causal", "bidirectional")
DRAWS_PICTURES = True


@pytest.fixture(scope="module")
def runs(checkpoints, segmentation, tmp_path_factory) -> list[str]:
    """Trained and untrained runs under both masks, and maps of one of them."""
    root = tmp_path_factory.mktemp("study")
    paths = []
    for mask in MASKS:
        for kind, more in (("probes", []), ("untrained", ["--model.untrained", "[adapter, llm]"])):
            out = root / mask / kind
            options = "--trainer.max_epochs 2 --save_predictions true".split()
            probe_runs.fit(checkpoints[mask], segmentation, out, *more, *options)
            paths.append(str(out))
    main(f"maps --probes {paths[0]} --image 0 1".split())
    return paths


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    main(f"report {Path(runs[0]).parents[1]} --out {out}".split())
    return out


def test_claims_equal_numpy_on_saved_predictions(runs, segmentation):
    targets = read_masks(segmentation / "annotations/validation")

    def miou(run, site):
        predictions = read_masks(run.path / "predictions" / site)
        return reference.scores(predictions, targets, 3)[0]

    claims = {(c["claim"], c["image_attention"]): c for c in evaluate_claims(*studies_of(runs))}
    for i, mask in enumerate(MASKS):
        trained = ProbeRun(runs[2 * i])
        control = ProbeRun(runs[2 * i + 1])
        drop = miou(trained, "encoder") - miou(trained, "adapter")
        gains = [
            max(miou(run, f"layer_{layer:02d}") for layer in (1, 2, 3)) - miou(run, "adapter")
            for run in (trained, control)
        ]
        assert claims["adapter_drop", mask]["value"] == pytest.approx(drop)
        assert claims["recovery", mask]["value"] == pytest.approx(gains[0])
        assert claims["recovery", mask]["control"]["value"] == pytest.approx(gains[1])
        assert claims["recovery_trained", mask]["value"] == pytest.approx(gains[0] - gains[1])


def test_starvation_equals_numpy_on_saved_predictions(runs, segmentation):
    result = starvation(ProbeRun(runs[0]), ProbeRun(runs[2]))
    site = result["site"]
    targets = read_masks(segmentation / "annotations/validation")
    for mask, path in zip(MASKS, (runs[0], runs[2]), strict=True):
        predictions = read_masks(ProbeRun(path).path / "predictions" / site)
        right = np.zeros(4)
        valid = np.zeros(4)
        for target, prediction in zip(targets, predictions, strict=True):
            for t, (rows, columns) in enumerate((r, c) for r in range(2) for c in range(2)):
                cell = np.s_[rows * 12 : rows * 12 + 12, columns * 10 : columns * 10 + 10]
                right[t] += ((prediction[cell] == target[cell]) & (target[cell] != 255)).sum()
                valid[t] += (target[cell] != 255).sum()
        np.testing.assert_allclose(result[mask], right / valid)
        assert result["first_row"][mask] == pytest.approx(right[:2].sum() / valid[:2].sum())
    assert result["gap"] == pytest.approx(
        np.subtract(result["bidirectional"], result["causal"]).tolist()
    )
    assert all(
        low <= gap <= high
        for gap, (low, high) in zip(result["gap"], result["gap_ci95"], strict=True)
    )


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
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_screen(
    chromium,
    page,
    width,
    scheme,
):
    tab = chromium.new_page(
        viewport={
            "width": width,
            "height": 900,
        },
        color_scheme=scheme,
    )
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


def test_runs_that_do_not_belong_together_are_rejected(runs, tmp_path):
    with pytest.raises(ValueError, match="only untrained controls were passed for"):
        studies_of([runs[1]])
    for folder in (tmp_path, runs[0]):
        with pytest.raises(SystemExit, match="is no study: expected a folder that holds finished"):
            main(f"report {folder} --out {tmp_path / 'none'}".split())


def test_a_report_of_other_tasks_alone_is_an_error(segmentation, tmp_path):
    write_depth_run(tmp_path / "tasks/depth", [0.5, 0.8, 0.7, 0.6, 0.6], segmentation)
    with pytest.raises(SystemExit, match="needs a run of segmentation beside those of other tasks"):
        main(f"report {tmp_path / 'tasks'} --out {tmp_path / 'none'}".split())
