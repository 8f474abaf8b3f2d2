"""The lab's page in a real browser (extra: browser)."""

import base64
import csv
import io
import re
import threading

import labs
import numpy as np
import pytest
import torch
from labs import address, point, settle
from PIL import Image

from probes import Knockout
from probes.lab.photos import encode
from probes.lab.requests import Block, PatchView, PhotoQuestion, Replace, View

pytest.importorskip("starlette", reason="starlette (extra: lab) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra: lab) is not installed")
pytestmark = pytest.mark.slow

BLOCK = Block(kind="block", patches=(0, 1))
HOSTILE = "<img src=x onerror=window.hacked=1>.png"


def shown_numbers(tab) -> list[dict]:
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Numbers (CSV)").click()
    return list(csv.DictReader(io.StringIO(download.value.path().read_text())))


def check_numbers(session, tab, views: list[View], image: Image.Image | None = None) -> None:
    """Compare the numbers of each panel with the Python API's, to the last bit."""
    rows = shown_numbers(tab)
    sites = session.models[0].sites
    names = session.models[0].classes
    grid = session.models[0].mllm.grid
    cells = len(sites) * grid[0] * grid[1]
    assert len(rows) == len(views) * cells
    for i, view in enumerate(views):
        best = labs.read_directly(session, view, image).topk(3)
        first = i * cells
        expected = zip(
            best.indices.flatten(0, 1).tolist(), best.values.flatten(0, 1).tolist(), strict=True
        )
        for row, (ids, shares) in zip(rows[first : first + cells], expected, strict=True):
            assert [row[f"class_{k}"] for k in (1, 2, 3)] == [names[j] for j in ids]
            assert [float(row[f"probability_{k}"]) for k in (1, 2, 3)] == shares


def views_of(photo: str, change=None) -> list[View]:
    """Return the views of the panels, in their order."""
    changes = [None] if change is None else [None, change]
    return [
        View(
            photo=photo,
            model=model,
            intervention=c,
        )
        for model in (0, 1)
        for c in changes
    ]


def test_painting_blocking_and_walking_show_the_numbers_of_the_python_api(open_tab, session):
    tab = open_tab("#photo=split:1&site=layer_02")
    check_numbers(session, tab, views_of("split:1"))
    tab.get_by_role("radio", name="paint").check()
    tab.mouse.move(*point(tab, 0))
    tab.mouse.down()
    tab.mouse.move(*point(tab, 1), steps=4)
    tab.mouse.up()
    settle(tab)
    assert address(tab)["patches"] == "0-1" and tab.locator("#panels figure").count() == 4
    check_numbers(session, tab, views_of("split:1", BLOCK))
    tab.get_by_label("in layers").fill("2")
    tab.get_by_label("in layers").press("Enter")
    settle(tab)
    check_numbers(session, tab, views_of("split:1", BLOCK.model_copy(update={"layers": (2, 3)})))
    for name, by in (
        ("replace by the mean", "mean"),
        ("replace by the other mask's", "other_mask"),
    ):
        tab.get_by_role("radio", name=name).check()
        settle(tab)
        change = Replace(kind="replace", patches=(0, 1), site="adapter", by=by)
        check_numbers(session, tab, views_of("split:1", change))
    assert "those under the other mask" in tab.locator("figcaption").nth(1).inner_text()
    assert tab.locator("#history li").count() == 4
    tab.get_by_role("button", name="Clear").click()
    settle(tab)
    assert tab.locator("#panels figure").count() == 2


def small_maps(tab) -> np.ndarray:
    """Return the pixels u8[S, h, w, 3] of the selected panel's patches at every site."""
    maps = tab.evaluate(
        """[...document.querySelectorAll("#features canvas")].map((canvas) =>
        [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data])"""
    )
    return np.array(maps, np.uint8).reshape(len(maps), 2, 2, 4)[..., :3]


def test_a_click_shows_the_similarity_of_all_patches_at_every_site(open_tab, session):
    tab = open_tab("#photo=split:1&site=layer_01&colours=similarity&patches=0-1")
    tab.mouse.click(*point(tab, 3, panel=1))
    settle(tab)
    assert address(tab)["patch"] == "3"
    request = PatchView(photo="split:1", model=0, intervention=BLOCK, patch=3)
    packed = session.similarity(request, labs.JOB)["similarity"]
    cosine = np.frombuffer(base64.b64decode(packed), "<f4").reshape(-1, 2, 2)
    shown = small_maps(tab)
    assert len(shown) == len(session.models[0].sites)
    blue = np.where(cosine < 0, 255, np.round(255 * (1 - np.abs(cosine).clip(max=1))))
    assert np.abs(shown[..., 2] - blue).max() <= 1
    tab.locator("#features button").nth(2).click()
    settle(tab)
    assert address(tab)["site"] == session.models[0].sites[2]


def test_colours_of_all_sites_follow_a_knockout(open_tab, session):
    tab = open_tab("#photo=split:1&site=layer_01&colours=pca&patches=0-1&panel=1")
    view = View(photo="split:1", model=0, intervention=BLOCK)
    for panel, packed in enumerate(session.pca(view, labs.JOB)["colours"]):
        tab.mouse.click(*point(tab, 0, panel=panel))
        settle(tab)
        expected = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(-1, 2, 2, 3)
        assert np.array_equal(small_maps(tab), expected)
    assert "fitted over a model's panels together" in tab.locator("#note").inner_text()


def test_a_photo_is_uploaded_and_a_link_restores_the_view(open_tab, session):
    tab = open_tab()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8))
    tab.locator("#file").set_input_files(
        {
            "name": HOSTILE,
            "mimeType": "image/png",
            "buffer": encode(image, "PNG"),
        }
    )
    tab.wait_for_selector("img.picture[src*=upload]")
    settle(tab)
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("photo.name") == HOSTILE
    key = address(tab)["photo"]
    check_numbers(session, tab, views_of(key), image)
    tab.get_by_role("slider", name="Site").fill("3")
    tab.mouse.click(*point(tab, 2, panel=1))
    tab.get_by_role("radio", name="probability").check()
    tab.get_by_label("as the model sees it").check()
    settle(tab)
    other = open_tab(tab.evaluate("location.hash"))
    assert address(other) == address(tab)
    assert address(tab)["patch"] == "2"
    for selector in ("#description", "#patch", "tbody", "#site-name b"):
        assert other.inner_text(selector) == tab.inner_text(selector)
    tab.reload()
    assert settle(tab).inner_text("tbody") == other.inner_text("tbody")


def test_answers_side_by_side_and_the_patches_of_a_word(open_tab, session):
    tab = open_tab("#photo=split:1&patches=0-1&site=layer_02")
    tab.get_by_role("textbox", name="Question").fill("Sky?")
    tab.keyboard.press("Enter")
    tab.locator("#answers[aria-busy=false] .answer").nth(3).wait_for()
    shown = tab.locator("#answers .answer").all_text_contents()
    expected = []
    for view in views_of("split:1", BLOCK)[1::2]:
        result = session.ask(PhotoQuestion(**view.model_dump(), question="Sky?"), labs.JOB)
        expected += [result["answer"], result["blocked"]["answer"]]
    assert shown == expected
    answer = shown[2]
    words = tab.locator("#answers .answer").nth(2).locator(".word")
    number = int(words.nth(1).get_attribute("value"))
    words.nth(0).focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    settle(tab)
    assert words.nth(1).get_attribute("aria-pressed") == "true"
    assert address(tab)["word"] == str(number)
    tab.locator("#head").select_option("2")
    settle(tab)
    for i, view in enumerate(views_of("split:1", BLOCK)):  # the same words in each panel
        knockout = (
            Knockout(torch.tensor([[True, True, False, False]])) if view.intervention else None
        )
        weights = session.models[view.model].mllm.answer_attention(
            session._pixels(view),
            "Sky?",
            answer,
            ["layer_02"],
            knockout,
            average_heads=False,
        )
        expected = weights["layer_02"][0, 1, number].tolist()
        assert tab.evaluate(f"Array.from(panels[{i}].weights)") == expected
    again = open_tab(tab.evaluate("location.hash"))
    for i in range(4):
        assert again.evaluate(f"Array.from(panels[{i}].weights)") == tab.evaluate(
            f"Array.from(panels[{i}].weights)"
        )
    tab.mouse.click(*point(tab, 2))
    settle(tab)
    assert (
        tab.input_value("#direction") == "to"
        and tab.locator(".word[aria-pressed=true]").count() == 0
    )


def show_image(tab, number: int) -> None:
    tab.get_by_role("spinbutton", name="or validation image").fill(str(number))
    tab.keyboard.press("Enter")


def test_a_cancelled_view_has_no_numbers_of_the_last_one(open_tab, session, monkeypatch):
    tab = open_tab("#photo=split:0&patches=1")
    monkeypatch.setattr(session, "read", lambda request, job: (job.cancelled.wait(60), job.check()))
    show_image(tab, 4)
    tab.get_by_role("button", name="Cancel").click()
    settle(tab)
    monkeypatch.undo()
    assert tab.evaluate("panels.map(({ readout }) => readout)") == 4 * [None]
    assert tab.inner_text("#legend") == "" and " change" not in tab.inner_text(
        "figcaption >> nth=1"
    )
    tab.get_by_role("button", name="Numbers (CSV)").click()
    assert "do not show this view yet" in tab.inner_text("#failure")
    tab.get_by_role("slider", name="Site").fill("2")
    check_numbers(session, settle(tab), views_of("split:4", Block(kind="block", patches=(1,))))


def test_a_photo_that_arrives_late_does_not_replace_the_next_one(open_tab):
    tab = open_tab("#photo=split:0")
    held = []
    tab.route(re.compile("photo.key=split%3A1"), lambda route: held.append(route))
    show_image(tab, 1)
    show_image(tab, 2)
    tab.wait_for_selector("img.picture[src*='split%3A2']")
    settle(tab)
    held[0].continue_()
    arrived = (
        tab.evaluate("opened.has('split:1')") or tab.wait_for_timeout(50) for _ in range(200)
    )
    assert any(arrived)
    assert tab.evaluate("photo.key") == "split:2"
    assert {row["photo"] for row in shown_numbers(tab)} == {tab.evaluate("opened.get('split:2')")}


def test_answers_stay_with_the_photo_they_were_asked_about(open_tab, session, monkeypatch):
    tab = open_tab("#photo=split:1&patches=1")
    asked = []
    more = threading.Event()
    ask = session.ask
    monkeypatch.setattr(
        session,
        "ask",
        lambda request, job: (asked.append(request.photo), more.wait(20), ask(request, job))[-1],
    )
    tab.get_by_role("textbox", name="Question").fill("Sky?")
    tab.keyboard.press("Enter")
    tab.evaluate("change({ photo: 'split:3' }), undefined")
    more.set()
    tab.locator("#answers[aria-busy=false] .answer").nth(3).wait_for()
    tab.wait_for_selector("#cancel", state="hidden")
    assert asked == ["split:1", "split:1"] and "Question: Sky? (" in tab.text_content("#answers")
    assert address(settle(tab))["photo"] == "split:3"
    assert address(tab)["patches"] == "1"
    tab.locator(".word").first.click()
    assert address(settle(tab))["photo"] == "split:1"


def test_everything_works_by_keyboard(open_tab):
    tab = open_tab("#photo=split:0&site=encoder")
    tab.locator(".stage").first.focus()
    for key, patch in (
        ("ArrowRight", "1"),
        ("ArrowDown", "3"),
        ("Home", "2"),
        ("ArrowUp", "0"),
        ("End", "1"),
    ):
        tab.keyboard.press(key)
        assert address(settle(tab))["patch"] == patch
    tab.keyboard.press("PageDown")
    assert tab.inner_text("#site-name b") == "adapter"
    tab.keyboard.press(" ")
    assert address(settle(tab))["patches"] == "1"
    assert tab.inner_text("#description").startswith("Row 1, column 2 at adapter: ")
    stops = set()
    active = "document.activeElement"
    tab.evaluate(f"{active}.blur()")
    for _ in range(60):
        tab.keyboard.press("Tab")
        stops.add(tab.evaluate(f"{active}.id || {active}.name || {active}.className"))
    expected = "file image square play site colours stage tool kind class clear first question png pdf csv link"
    assert set(expected.split()) <= stops
    controls = "[...document.querySelectorAll('input, select, button')]"
    unnamed = f"{controls}.filter(x => !x.labels?.length && !x.ariaLabel && !x.textContent)"
    assert tab.evaluate(f"{unnamed}.map(x => x.id)") == []


def test_the_picture_holds_the_panels(open_tab):
    tab = open_tab("#photo=split:1&patches=1&panel=1")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="Picture (PNG)").click()
    picture = Image.open(download.value.path())
    assert picture.width > 800
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_hostile_addresses_show_defaults(open_tab, session):
    numbers = "#photo=javascript:1&site=<b>&patch=1e9&panel=-1&patches=0-99999999999.x&layers=9-1"
    tab = open_tab(numbers + "&head=<script>&colours=x&kind=y&direction=word&word=9")
    assert tab.evaluate("[view.direction, view.word]") == ["to", 9]
    assert tab.evaluate("[view.photo, view.site, view.patch, view.first, view.last]") == [
        "split:0",
        session.models[0].first_site,
        0,
        1,
        3,
    ]
    assert tab.evaluate("[...view.patches]") == [0, 1, 2, 3]
    assert tab.evaluate("window.hacked") is None
