"""The explorer page: its bytes, and what it shows in a real browser (extra: browser)."""

import base64
import json
import re
import zlib
from dataclasses import replace

import labs
import numpy as np
import probe_runs
import pytest
import tiny_models
import torch
from labs import settle

from probes.analyses.explore.readout import RunReadout, explore
from probes.analyses.explore.run import page_data, write_page
from probes.cli import main
from probes.results.probe_run import ProbeRun

IMAGES = [0, 2, 4]
HOSTILE = "</script><script>window.hacked=1</script>"
CLASSES = ["sky", HOSTILE, "<script>"]
NAME = "<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def runs(checkpoints, tmp_path_factory) -> list[ProbeRun]:
    """A causal and a bidirectional run on images with hostile names."""
    root = tiny_models.write_segmentation(
        tmp_path_factory.mktemp("data"),
        training=4,
        validation=5,
        seed=5,
    )
    (root / "classes.json").write_text(json.dumps({"classes": CLASSES, "ignore_index": 255}))
    for kind in ("images", "annotations"):
        (root / kind / "validation/002.png").rename(root / kind / "validation" / f"002{NAME}.png")

    def fit(mask):
        return probe_runs.fit(
            checkpoints[mask],
            root,
            tmp_path_factory.mktemp(mask),
            "--data.batch_size",
            "2",
        )

    return [fit(mask) for mask in ("causal", "bidirectional")]


@pytest.fixture(scope="module")
def explored(runs) -> list[RunReadout]:
    """Both runs, with a vocabulary of hostile words, more than one byte can count."""
    readouts = [explore(run, IMAGES) for run in runs]
    rng = torch.Generator().manual_seed(0)
    for i, run in enumerate(readouts):
        words = [readout.words for image in run.images for readout in image.readings.values()]
        for ids in words:
            ids.copy_(torch.randint(600, ids.shape, generator=rng))
        used = torch.cat([ids.flatten() for ids in words]).unique().tolist()
        readouts[i] = replace(run, vocabulary={token: f"{HOSTILE}{token}" for token in used})
    return readouts


@pytest.fixture(scope="module")
def page(explored, tmp_path_factory):
    return write_page(explored, tmp_path_factory.mktemp("out"))


# ------------------------------------------------------------------------------------------------- bytes
def test_blocks_hold_the_readouts_to_half_of_1_in_255(explored, page):
    html = page.read_text()
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]
    )
    blocks = dict(
        re.findall(
            r'<script type="text/plain" id="block-([\d-]+)">([A-Za-z0-9+/=]*)</script>', html
        )
    )
    assert len(blocks) == sum(len(image.readings) for run in explored for image in run.images)
    assert data["classes"] == CLASSES
    for r, run in enumerate(explored):
        of_classes = (3, len(run.sites), 4)
        of_words = (3, len(run.word_sites), 4)
        shapes = [(4,), (4,), of_classes, of_classes, (2, *of_words), of_words]
        for i, image in enumerate(run.images):
            for c, readout in enumerate(image.readings.values()):
                raw = zlib.decompress(base64.b64decode(blocks[f"{r}-{i}-{c}"]))
                ends = np.cumsum([np.prod(shape) for shape in shapes])
                assert len(raw) == ends[-1]
                parts = np.split(np.frombuffer(raw, np.uint8), ends[:-1])
                truth, blocked, classes, shares, words, word_shares = (
                    part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)
                )
                assert truth.tolist() == [255 if k < 0 else k for k in image.truth.tolist()]
                assert blocked.tolist() == readout.blocked.int().tolist()
                assert (classes == readout.classes.numpy()).all()
                low, high = words.astype(int)
                texts = np.vectorize(data["words"].__getitem__)(low + 256 * high)
                expected = np.vectorize(run.vocabulary.__getitem__)(readout.words.numpy())
                assert (texts == expected).all()
                for found, exact in (
                    (shares, readout.class_probabilities),
                    (word_shares, readout.word_probabilities),
                ):
                    assert abs(found / 255 - exact.numpy()).max() <= 0.5 / 255


def test_page_is_self_contained_escaped_and_reproducible(explored, page, tmp_path):
    html = page.read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert "default-src 'none'" in html
    assert not re.search(r"<(link|script|img|iframe|object)\b[^>]*(src|href)=|@import|url\(", html)
    assert "<script>window.hacked" not in html
    assert "<img src=x" not in html
    assert html.count("</script>") == len(re.findall(r"<script[ >]", html))
    assert write_page(explored, tmp_path).read_bytes() == page.read_bytes()


def test_report_links_to_an_explorer_in_its_folder(runs, tmp_path):
    link = '<a href="explorer.html">'
    main(["report", str(runs[0].path), "--out", str(tmp_path)])
    assert link not in (tmp_path / "index.html").read_text()
    main(["explore", str(runs[0].path), "--images", "1", "--out", str(tmp_path)])
    main(["report", str(runs[0].path), "--out", str(tmp_path)])
    assert link in (tmp_path / "index.html").read_text()


# ------------------------------------------------------------------------------------------------- browser
@pytest.fixture
def open_page(chromium, page):
    """Open the page at a fragment; any other request, or an error in the page, fails the test."""
    with labs.browser_tabs(chromium, page.as_uri(), (page.as_uri(), "data:")) as open_tab:
        yield open_tab


def percent(probability: float) -> str:
    share = round(255 * probability)
    return "<1" if 0 < share < 3 else str(int(share / 2.55 + 0.5))


def expected_rows(
    run: RunReadout,
    image: int,
    condition: str,
    patch: int,
) -> list[list[tuple[str, str]]]:
    """Return (text, percent) of classes and words per site, from the readout."""
    readout = run.images[image].readings[condition]
    rows = []
    for s, site in enumerate(run.sites):
        ids = readout.classes[:, s, patch].tolist()
        shares = readout.class_probabilities[:, s, patch].tolist()
        row = [(CLASSES[k], percent(p)) for k, p in zip(ids, shares, strict=True)]
        if site in run.word_sites:
            w = run.word_sites.index(site)
            ids = readout.words[:, w, patch].tolist()
            shares = readout.word_probabilities[:, w, patch].tolist()
            row += [(run.vocabulary[i], percent(p)) for i, p in zip(ids, shares, strict=True)]
        rows.append([(text, p) for text, p in row if p != "0"])
    return rows


def shown_rows(tab) -> list[list[tuple[str, str]]]:
    """Return the same from the page."""
    settle(tab)
    rows = tab.eval_on_selector_all(
        "tbody tr",
        """rows => rows.map(row => [...row.querySelectorAll(".shares > span")].map(item =>
             [item.querySelector("bdi").textContent, item.querySelector("small").textContent]))""",
    )
    return [[(text, p) for text, p in row if p != "0"] for row in rows]


def centre(tab, patch: int) -> tuple[float, float]:
    """Return the screen position of the centre of a patch of the 2 x 2 grid."""
    box = tab.locator("canvas").bounding_box()
    return box["x"] + box["width"] * (0.25 + patch % 2 / 2), box["y"] + box["height"] * (
        0.25 + patch // 2 / 2
    )


@pytest.mark.slow
def test_every_choice_shows_its_own_readout(open_page, explored):
    tab = open_page()
    for run in explored:
        tab.get_by_role("radio", name=run.run.metrics["image_attention"]).check()
        for i, image in enumerate(run.images):
            tab.locator("#images input").nth(i).check()
            settle(tab)
            assert tab.locator("#conditions input").count() == len(image.readings)
            for c, condition in enumerate(image.readings):
                tab.locator("#conditions input").nth(c).check()
                settle(tab)
                tab.mouse.click(*centre(tab, 3))
                assert shown_rows(tab) == expected_rows(run, i, condition, 3)
                blocked = "Blocked: no other patch attends to it" in tab.inner_text("#description")
                assert blocked == bool(image.readings[condition].blocked[3])


@pytest.mark.slow
def test_everything_works_by_keyboard(open_page, explored):
    tab = open_page()
    stops = []
    for _ in range(8):
        tab.keyboard.press("Tab")
        stops.append(
            tab.evaluate(
                "(({ name, id, tagName }) => name || id || tagName.toLowerCase())(document.activeElement)"
            )
        )
    assert stops == "summary images runs conditions colours play site stage".split()
    tab.locator("#runs input:checked").focus()
    tab.keyboard.press("ArrowRight")
    settle(tab)
    assert tab.inner_text("caption").startswith("bidirectional")
    tab.locator("#stage").focus()
    for key, patch in (
        ("ArrowRight", 1),
        ("ArrowRight", 1),
        ("ArrowDown", 3),
        ("Home", 2),
        ("ArrowUp", 0),
        ("End", 1),
    ):
        tab.keyboard.press(key)
        assert shown_rows(tab) == expected_rows(explored[1], 0, "none", patch)
    tab.keyboard.press("PageDown")
    settle(tab)
    assert tab.inner_text("#site-name b") == "adapter"


@pytest.mark.slow
def test_canvas_has_the_colour_of_each_predicted_class(open_page, explored):
    tab, (data, _) = open_page("#site=layer_02&image=4"), page_data(explored)
    s = explored[0].sites.index("layer_02")
    image = explored[0].images[2]
    for choice, classes in (
        ("predicted", image.readings["none"].classes[0, s]),
        ("true", image.truth),
    ):
        tab.locator("#colours").get_by_role("radio", name=choice).check()
        settle(tab)
        for t, k in enumerate(classes.tolist()):
            pixel = tab.evaluate(
                """t => { const c = document.querySelector("canvas"), pen = c.getContext("2d");
                     const x = (0.1 + t % 2 / 2) * c.width, y = (0.4 + (t >> 1) / 2) * c.height;
                     return [...pen.getImageData(x, y, 1, 1).data]; }""",
                t,
            )
            assert pixel[3] == pytest.approx(128, abs=1)
            assert pixel[:3] == pytest.approx(data["palette"][k], abs=2)


@pytest.mark.slow
def test_hostile_names_are_text(open_page):
    tab = open_page(f"#image=2&condition={HOSTILE}&site=<b>&patch=99&run=-1")
    assert tab.evaluate("window.hacked") is None
    assert tab.get_attribute("#picture", "alt") == f"Image 2, 002{NAME}"
    assert HOSTILE in tab.inner_text("tbody")
    assert "<script>" in tab.inner_text("tbody")
    assert tab.evaluate("[view.run, view.condition, view.site, view.patch]") == [0, "none", 0, 0]


@pytest.mark.slow
def test_address_restores_the_view(open_page, explored):
    tab = open_page()
    tab.locator("#images input").nth(1).check()
    tab.get_by_role("radio", name="bidirectional").check()
    tab.get_by_role("slider", name="Site").fill("3")
    tab.mouse.click(*centre(tab, 2))
    restored = open_page(tab.evaluate("location.hash"))
    assert shown_rows(restored) == shown_rows(tab) == expected_rows(explored[1], 1, "none", 2)
    assert restored.inner_text("#site-name b") == tab.inner_text("#site-name b") == "layer 02"
