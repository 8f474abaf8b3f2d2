"""The lab's page in a real browser (extra: browser)."""

import base64
import re
from itertools import product

import labs
import numpy as np
import pytest
from labs import address, point, settle
from PIL import Image

from probes.lab.models import open_checkpoint
from probes.lab.photos import encode_image
from probes.lab.requests import Block, PatchView, PhotoQuestion, Replace, ShownViews, View

pytest.importorskip("starlette", reason="starlette (extra: lab) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra: lab) is not installed")
pytestmark = pytest.mark.slow

BLOCK = Block(kind="block", patches=(0, 1))
HOSTILE = "<img src=x onerror=window.hacked=1>.png"
SHOWN = "panels.map(({classes}) => FIRST.sites.map((_, s) => PATCHES.map((t) => classes(s, t))))"


def press(tab, name: str) -> None:
    tab.get_by_role("button", name=name, exact=True).first.click()
    settle(tab)


def check_numbers(session, tab, views: list[View], image: Image.Image | None = None) -> None:
    """Compare the numbers of each panel with the Python API's, to the last bit."""
    shown = tab.evaluate(SHOWN)
    assert len(shown) == len(views)
    for panel, view in zip(shown, views, strict=True):
        best = labs.read_directly(session, view, image).topk(3)
        ranks = [[[(rank["k"], rank["share"]) for rank in t] for t in site] for site in panel]
        shown_ranks = np.array(ranks)
        assert np.array_equal(shown_ranks[..., 0], best.indices.numpy())
        assert np.array_equal(shown_ranks[..., 1], best.values.double().numpy())


def views_of(photo: str, change=None) -> list[View]:
    """Return the views of the panels, in their order."""
    changes = [None] if change is None else [None, change]
    return [View(photo=photo, model=model, intervention=x) for model, x in product((0, 1), changes)]


def test_painting_blocking_and_replacing_show_the_numbers_of_the_python_api(open_tab, session):
    tab = open_tab("#photo=split:1&site=layer_02&colours=difference")
    check_numbers(session, tab, views_of("split:1"))
    press(tab, "Intervene")
    tab.mouse.move(*point(tab, 0))
    tab.mouse.down()
    tab.mouse.move(*point(tab, 1), steps=4)
    tab.mouse.up()
    settle(tab)
    assert address(tab)["patches"] == "0.1"
    check_numbers(session, tab, views_of("split:1"))
    press(tab, "block them")
    check_numbers(session, tab, views_of("split:1", BLOCK))
    tab.get_by_label("First layer").fill("2")
    tab.get_by_label("First layer").press("Enter")
    settle(tab)
    check_numbers(session, tab, views_of("split:1", BLOCK.model_copy(update={"layers": (2, 3)})))
    press(tab, "by the other mask's")
    change = Replace(kind="replace", patches=(0, 1), site="adapter", by="other_mask")
    check_numbers(session, tab, views_of("split:1", change))
    assert "those under the other mask" in tab.locator("figcaption").nth(1).inner_text()
    press(tab, "Clear")
    assert tab.locator("#panels figure").count() == 2
    tab.locator("#legend button").first.click()
    count = int(tab.locator("#legend button").first.inner_text().split()[-1])
    assert len(address(settle(tab))["patches"].split(".")) == count


def small_maps(tab) -> np.ndarray:
    """Return the pixels u8[S, h, w, 3] of the selected panel's patches at every site."""
    maps = tab.evaluate(
        """[...document.querySelectorAll("#strip canvas")].map((canvas) =>
        [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data])"""
    )
    return np.array(maps, np.uint8).reshape(len(maps), 2, 2, 4)[..., :3]


def test_a_click_shows_the_similarity_of_all_patches_at_every_site(open_tab, session):
    tab = open_tab("#photo=split:1&site=layer_01&colours=similarity&patches=0.1&kind=block")
    tab.mouse.click(*point(tab, 3, panel=1))
    settle(tab)
    request = PatchView(photo="split:1", model=0, intervention=BLOCK, patch=3)
    packed = session.similarity(request, labs.JOB)["similarity"]
    cosine = np.frombuffer(base64.b64decode(packed), "<f4").reshape(-1, 2, 2)
    blue = np.where(cosine < 0, 255, np.round(255 * (1 - np.abs(cosine).clip(max=1))))
    assert np.abs(small_maps(tab)[..., 2] - blue).max() <= 1
    tab.locator("#strip button").nth(2).click()
    settle(tab)
    assert address(tab)["site"] == session.models[0].sites[2]
    tab.keyboard.press("ArrowRight")
    assert address(settle(tab))["site"] == session.models[0].sites[3]


def test_pca_colours_of_all_sites_follow_a_knockout_and_hold_for_a_second_photo(open_tab, session):
    tab = open_tab("#photo=split:1&beside=split:3&site=layer_01&colours=pca&patches=0.1&kind=block")
    shown = ShownViews(photo="split:1", model=0, intervention=BLOCK, beside="split:3")
    packed = session.pca(shown, labs.JOB)["colours"]
    assert len(packed) == 3
    for panel, of_panel in enumerate(packed):
        tab.mouse.click(*point(tab, 0, panel=panel))
        settle(tab)
        expected = np.frombuffer(base64.b64decode(of_panel), np.uint8).reshape(-1, 2, 2, 3)
        assert np.array_equal(small_maps(tab), expected)
    assert "both photos, with and without the intervention" in tab.locator("#note").inner_text()
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_photo_is_uploaded_and_a_link_restores_the_view(open_tab, session):
    tab = open_tab()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 60, 3), np.uint8))
    photo = encode_image(image, "PNG")
    file = {"name": HOSTILE, "mimeType": "image/png", "buffer": photo}
    tab.locator("#file").set_input_files(file)
    tab.wait_for_selector("img[src*=upload]")
    settle(tab)
    assert tab.evaluate("window.hacked") is None
    assert tab.evaluate("photos.get(view.photo).name") == HOSTILE
    check_numbers(session, tab=tab, views=views_of(address(tab)["photo"]), image=image)
    tab.locator("#strip button").nth(3).click()
    tab.mouse.click(*point(tab, 2, panel=1))
    press(tab, "pixels")
    other = open_tab(settle(tab).evaluate("location.hash"))
    assert address(other) == address(tab)
    for selector in ("#description", "tbody", "#site-name"):
        assert other.inner_text(selector) == tab.inner_text(selector)


DROP = """(content) => {
  const files = new DataTransfer();
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  files.items.add(new File([bytes], "mine.png", { type: "image/png" }));
  for (const type of ["dragover", "drop"]) {
    const event = new DragEvent(type, { dataTransfer: files, bubbles: true, cancelable: true });
    document.querySelector("#panels").dispatchEvent(event);
  }
}"""


def first_site(reads: list[bool], titles: list[str]) -> str:
    """Return the site from which on a class is read, in the page's words, from the last site back."""
    if all(reads):
        return "at every site"
    since = len(reads)
    while since and reads[since - 1]:
        since -= 1
    if since < len(reads):
        return f"from {titles[since]} on"
    if not any(reads):
        return "at no site"
    return f"at {titles[reads.index(True)]} first, but not at the last site"


@pytest.mark.parametrize("width", [1280, 390])
def test_a_dropped_photo_leads_to_the_site_that_reads_an_object_and_to_blocking_it(
    open_tab, session, width
):
    tab = open_tab()
    tab.set_viewport_size({"width": width, "height": 844})
    image = Image.fromarray(np.random.default_rng(2).integers(0, 255, (40, 60, 3), np.uint8))
    tab.evaluate(DROP, base64.b64encode(encode_image(image, "PNG")).decode())
    tab.wait_for_selector("img[src*=upload]")
    settle(tab)
    assert "mine.png" in tab.inner_text(".drop")
    assert tab.locator("#colours >> text=truth").count() == 0  # a photo of one's own has no labels
    tab.locator("#legend button").first.click()
    settle(tab)
    shown = address(tab)
    patches = [int(t) for t in shown["patches"].split(".")]
    model = session.models[0]
    titles = tab.evaluate("FIRST.titles")
    since = []
    for view in views_of(shown["photo"]):
        read = labs.read_directly(session, view, image).argmax(-1).numpy()  # [S, T]
        if view.model == 0:
            object_class = read[model.sites.index(shown["site"])][patches[0]]
        since.append(
            first_site(((read[:, patches] == object_class).mean(1) > 0.5).tolist(), titles)
        )
    lines = tab.inner_text("#since").split("\n")
    assert lines[0].startswith(model.classes[object_class])
    assert lines[1:] == [f"by {key} {text}" for key, text in zip("AB", since, strict=True)]
    press(tab, "Intervene")
    press(tab, "block them")
    block = Block(kind="block", patches=tuple(patches))
    check_numbers(session, tab=tab, views=views_of(shown["photo"], block), image=image)
    press(tab, "Ask")
    tab.get_by_role("textbox", name="Question").fill("Sky?")
    tab.keyboard.press("Enter")
    tab.locator("#answers[aria-busy=false]").wait_for()
    assert tab.locator("#answers .answer").count() == 4
    assert "blocked" in tab.inner_text("#answers .changed")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_strip_has_the_scores_of_the_runs_and_shows_that_it_waits(
    open_tab, session, monkeypatch
):
    tab = open_tab("#photo=split:0")
    scores = [[100 * site["miou"] for site in x.run.metrics["sites"]] for x in session.models]
    texts = [
        tile.all_inner_texts() for tile in (tab.locator("#tiles .m0"), tab.locator("#tiles .m1"))
    ]
    shown = [[float(text) for text in of_model if text] for of_model in texts]
    assert np.allclose(shown, scores, atol=0.051)
    monkeypatch.setattr(session, "read", lambda request, job: (job.cancelled.wait(60), job.check()))
    show_image(tab, 3)
    pulse = "getComputedStyle(document.querySelector('#strip canvas')).animationName"
    assert tab.evaluate(pulse) == "pulse"
    tab.get_by_role("button", name="Cancel").click()
    settle(tab)
    assert tab.evaluate(pulse) == "none"


def test_a_checkpoint_without_probes_shows_similarity_and_words_of_a_photo(checkpoints, chromium):
    session = labs.Session(open_checkpoint(str(checkpoints["causal"])))
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (40, 60, 3), np.uint8))
    photo = {"name": "a.png", "mimeType": "image/png", "buffer": encode_image(image, "PNG")}
    with labs.serve(session) as port:
        server = f"http://127.0.0.1:{port}/"
        address = f"{server}?token={labs.TOKEN}"
        with labs.browser_tabs(chromium, address, (server, "data:", "blob:")) as open_tab:
            tab = open_tab()
            tab.locator("#file").set_input_files(photo)
            tab.wait_for_selector("img[src*=upload]")
            assert settle(tab).inner_text("#failure") == ""
            words = tab.locator("tbody td").all_inner_texts()
            assert len(words) == len(session.models[0].sites)
            assert [bool(text) for text in words] == [
                site in session.models[0].word_sites for site in session.models[0].sites
            ]
            assert small_maps(tab)[..., 0].min() > 0  # tiles are coloured


def test_answers_without_and_with_a_knockout_are_side_by_side(open_tab, session):
    tab = open_tab("#photo=split:1&patches=0.1&kind=block&site=layer_02&tab=ask")
    tab.get_by_role("textbox", name="Question").fill("Sky?")
    tab.keyboard.press("Enter")
    tab.locator("#answers[aria-busy=false]").wait_for()
    results = [
        session.ask(PhotoQuestion(**dict(view), question="Sky?"), labs.JOB)
        for view in views_of("split:1", BLOCK)[1::2]
    ]
    expected = [result[key] for key in ("answer", "blocked") for result in results]
    assert tab.locator("#answers .answer").all_text_contents() == expected


def show_image(tab, number: int) -> None:
    tab.get_by_role("spinbutton", name="photo").fill(str(number + 1))
    tab.keyboard.press("Enter")


def test_a_cancelled_view_has_no_numbers_of_the_last_one(open_tab, session, monkeypatch):
    tab = open_tab("#photo=split:0&patches=1&kind=block")
    monkeypatch.setattr(session, "read", lambda request, job: (job.cancelled.wait(60), job.check()))
    show_image(tab, 4)
    tab.get_by_role("button", name="Cancel").click()
    settle(tab)
    monkeypatch.undo()
    assert tab.evaluate("panels.map(({ classes }) => classes)") == 4 * [None]
    assert tab.inner_text("#legend") == ""
    assert " change" not in tab.inner_text("figcaption >> nth=1")
    tab.locator("#strip button").nth(2).click()
    check_numbers(session, settle(tab), views_of("split:4", Block(kind="block", patches=(1,))))


def test_a_photo_that_arrives_late_does_not_replace_the_next_one(open_tab):
    tab = open_tab("#photo=split:0")
    held = []
    tab.route(re.compile("photo.key=split%3A1"), lambda route: held.append(route))
    show_image(tab, 1)
    show_image(tab, 2)
    tab.wait_for_selector("img[src*='split%3A2']")
    settle(tab)
    held[0].continue_()
    arrived = (
        tab.evaluate("photos.has('split:1')") or tab.wait_for_timeout(50) for _ in range(200)
    )
    assert any(arrived)
    assert tab.evaluate("panels.map(({ photo }) => photo)") == 2 * ["split:2"]


def test_everything_works_by_keyboard(open_tab):
    tab = open_tab("#photo=split:0&site=encoder&patch=0")
    tab.locator(".stage").first.focus()
    keys = {"ArrowRight": "1", "ArrowDown": "3", "ArrowLeft": "2", "ArrowUp": "0"}
    for key, patch in keys.items():
        tab.keyboard.press(key)
        assert address(settle(tab))["patch"] == patch
    tab.keyboard.press("PageDown")
    assert tab.inner_text("#site-name") == "adapter"
    tab.keyboard.press(" ")
    tab.keyboard.press("ArrowRight")
    assert address(settle(tab))["patches"] == "0"
    assert tab.inner_text("#description").startswith("Row 1, column 2")
    controls = "[...document.querySelectorAll('input, select, button')]"
    unnamed = f"{controls}.filter(x => !x.labels?.length && !x.ariaLabel && !x.textContent)"
    assert tab.evaluate(f"{unnamed}.map(x => x.id)") == []


def test_hostile_addresses_show_defaults(open_tab, session):
    hostile = "#photo=javascript:1&site=<b>&patch=1e9&panel=-1&patches=0.99999999999.x&first=9"
    tab = open_tab(f"{hostile}&last=-1&tab=<script>&colours=x&kind=y&beside=//a")
    shown = address(tab)
    assert shown.pop("site") == session.models[0].sites[session.models[0].first_site]
    values = "split:0 3 0 predicted patch none 1 3 adapter split:0 0"
    keys = "photo patch panel colours tab kind first last at other patches"
    assert shown == dict(zip(keys.split(), values.split(), strict=True))
