"""Teaching concepts on the lab's page, in a real browser (extra: browser)."""

import json
import re
from base64 import b64decode

import labs
import pytest
from labs import address, point, settle

from probes.data.folder import FolderDataset
from probes.lab.requests import Block, PaintedPhoto, Painting, Teach, View

pytest.importorskip("starlette", reason="starlette (extra: lab) is not installed")
pytest.importorskip("uvicorn", reason="uvicorn (extra: lab) is not installed")
pytestmark = pytest.mark.slow


def stroke(tab, key: str, *patches: int) -> None:
    """Choose a concept by its key, and drag over patches of the first panel."""
    tab.keyboard.press(key)
    tab.mouse.move(*point(tab, patches[0]))
    tab.mouse.down()
    for patch in patches[1:]:
        tab.mouse.move(*point(tab, patch))
    tab.mouse.up()


def solved(tab):
    """Wait until the page shows what is painted: its requests are sent a moment after a stroke."""
    tab.wait_for_timeout(300)
    return settle(tab)


def show(tab, image: int):
    tab.get_by_role("spinbutton", name="or validation image").fill(str(image))
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f"img.picture[src*='split%3A{image}']")
    tab.locator("h1").click()  # keys are for the page again
    return settle(tab)


def painting(*photos: tuple[int, tuple, tuple], rest: bool = False) -> Painting:
    return Painting(
        concepts=("concept 1", "concept 2"),
        photos=tuple(
            PaintedPhoto(photo=f"split:{i}", patches=tuple(patches)) for i, *patches in photos
        ),
        rest=rest,
    )


def curve_of(session, paint: Painting, **more) -> list[float]:
    request = Teach(
        photo=paint.photos[0].photo,
        model=0,
        painting=paint,
        **more,
    )
    return [score for score, _, _ in session.teach(request, labs.JOB)["scores"]]


def drawn(tab, curve: str) -> list[float]:
    """Return the scores at the heights of a curve's points."""
    heights = tab.evaluate(
        f"[...document.querySelectorAll('#curve circle.{curve}')].map((c) => c.cy.baseVal.value)"
    )
    return [pytest.approx(1 - (y - 8) / (190 - 8 - 24), abs=1e-6) for y in heights]


def strip(tab) -> list[list[int]]:
    """Return the photos of the strip, and how many colours each map has."""
    return tab.evaluate("[...document.querySelectorAll('#strip button')].map((b) => b.value)")


def test_two_concepts_are_taught_on_one_photo_and_read_on_others(open_tab, session):
    tab = open_tab("#photo=split:2&site=layer_02")
    show(tab, 1)
    show(tab, 0)
    stroke(tab, "1", 0, 1)
    solved(tab)
    assert (
        "Paint a second concept" in tab.inner_text("#taught-note")
        and not tab.locator("#curve").is_visible()
    )
    assert tab.evaluate("DATA.classes") == session.models[0].classes, "one concept shows no map yet"
    stroke(tab, "2", 2, 3)
    solved(tab)
    paint = painting((0, (0, 1), (2, 3)))
    assert json.loads(tab.evaluate("JSON.stringify(painting())")) == json.loads(
        paint.model_dump_json()
    )
    assert drawn(tab, "plain") == curve_of(session, paint)
    assert "There is one photo" in tab.inner_text("#taught-note")
    assert strip(tab) == ["split:0", "split:2", "split:1"]
    for key in ("split:0", "split:1"):
        view = View(
            photo=key,
            model=0,
            painting=paint,
        )
        tab.evaluate(f"change({{ photo: '{key}' }}), undefined")
        settle(tab)
        shown = tab.evaluate("Array.from(panels[0].readout.predicted(view.site))")
        result = session.read(view, labs.JOB)
        s = session.models[0].sites.index("layer_02")
        assert shown == list(b64decode(result["classes"]))[4 * s : 4 * s + 4]
    assert set(tab.locator("#legend li").all_inner_texts()) <= {
        f"concept {k} {n}" for k in (1, 2) for n in range(1, 5)
    }


def test_curve_under_a_knockout_of_a_random_llm_and_with_the_slider(open_tab, session):
    tab = open_tab("#photo=split:0&site=encoder&patches=1")
    for image, other in ((0, 3), (1, 2), (3, 3)):
        show(tab, image)
        stroke(tab, "1", 0)
        stroke(tab, "2", other)
        solved(tab)
    paint = painting((0, (0,), (3,)), (1, (0,), (2,)), (3, (0,), (3,)))
    change = Block(kind="block", patches=(1,))
    assert drawn(tab, "plain") == curve_of(session, paint)
    assert drawn(tab, "blocked") == curve_of(session, paint, intervention=change)
    assert "3 photos are too few" in tab.inner_text("#taught-note")
    tab.get_by_role("button", name="Compare with a random LLM").click()
    tab.wait_for_selector("#curve circle.random")
    settle(tab)
    assert drawn(tab, "random") == curve_of(session, paint, random=True)
    tab.get_by_role("slider", name="Site").fill("3")
    settle(tab)
    assert tab.inner_text("#score").startswith("layer 02: ") and "random LLM" in tab.inner_text(
        "#score"
    )
    tab.locator("#curve").click(position={"x": 45, "y": 60})
    assert address(settle(tab))["site"] == "encoder"


def test_rest_is_background_and_maps_can_be_put_away(open_tab, session):
    tab = open_tab("#photo=split:0&site=layer_01")
    stroke(tab, "1", 0, 1)
    tab.get_by_label("the rest of painted photos is background").check()
    solved(tab)
    assert tab.evaluate("DATA.classes") == ["concept 1", "background"]
    assert tab.evaluate("painting().rest")
    assert drawn(tab, "plain")
    tab.get_by_label("show their maps").uncheck()
    solved(tab)
    assert tab.evaluate("DATA.classes") == session.models[0].classes
    assert tab.locator("#curve").is_visible()


def test_paint_survives_a_reload_is_saved_and_opened(open_tab, session):
    tab = open_tab("#photo=split:0&site=layer_01")
    for image in (0, 1):
        show(tab, image)
        stroke(tab, "1", 0)
        stroke(tab, "2", 2, 3)
    name = tab.get_by_label("Name of concept 1")
    name.fill("<b>road</b>")
    name.press("Enter")
    solved(tab)
    before = tab.evaluate("JSON.stringify(painting())")
    assert json.loads(before)["concepts"] == ["<b>road</b>", "concept 2"]
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    settle(tab)
    assert tab.evaluate("JSON.stringify(painting())") == before
    assert drawn(tab, "plain")
    tab.get_by_role("button", name="Save as data folder").click()
    tab.get_by_text("Saved to").wait_for()
    folder = re.search(r"Saved to (\S+)\. Next: probes study", tab.inner_text("#saved"))[1]
    data = FolderDataset(folder, "training")
    assert data.classes == ["<b>road</b>", "concept 2"]
    assert set(data[0]["target"].flat) == {0, 1, 255}
    tab.get_by_role("button", name="Remove paint").click()
    solved(tab)
    assert tab.evaluate("painting()") is None and tab.locator("#strip button").count() == 0
    tab.get_by_role("button", name="Open", exact=True).click()
    tab.wait_for_selector("#curve circle.plain")
    solved(tab)
    opened = tab.evaluate("painting().photos.map(({ patches }) => patches)")
    assert opened == [[[0], [2, 3]]] * 2
    assert address(tab)["photo"].startswith("upload:")


def test_paint_by_keyboard_and_undo(open_tab):
    tab = open_tab("#photo=split:0")
    tab.locator(".stage").first.focus()
    for key in ("1", " ", "ArrowRight", "2", " ", "ArrowDown", " "):
        tab.keyboard.press(key)
    solved(tab)
    assert tab.evaluate("[...gridOf('split:0')]") == [0, 1, -1, 1]
    tab.keyboard.press(" ")
    assert tab.evaluate("[...gridOf('split:0')]") == [0, 1, -1, -1]
    tab.keyboard.press("Control+z")
    tab.keyboard.press("Control+z")
    solved(tab)
    assert tab.evaluate("[...gridOf('split:0')]") == [0, 1, -1, -1]
    tab.get_by_role("radio", name="erase concepts").check()
    tab.locator(".stage").first.focus()
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press(" ")
    assert tab.evaluate("[...gridOf('split:0')]") == [0, -1, -1, -1]
    tab.get_by_label("Name of concept 1").click()
    tab.keyboard.press("2")
    assert tab.evaluate("view.tool") == "unpaint", "digits in a text are text"


def test_only_the_last_of_quick_strokes_is_solved(open_tab):
    tab = open_tab("#photo=split:0")
    sent = []
    tab.on(
        "request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/run/teach") else None
    )
    tab.evaluate("""for (const [t, k] of [[0, 0], [1, 1], [2, 0], [3, 1]]) {
        const grid = gridOf("split:0").slice(); grid[t] = k; view.photo = "split:0"; stroke(grid);
    }""")
    solved(tab)
    assert [request["painting"]["photos"][0]["patches"] for request in sent] == [[[0, 2], [1, 3]]]


def test_names_of_concepts_are_checked(open_tab):
    tab = open_tab("#photo=split:0")
    for text, message in (
        ("concept 2", "already"),
        ("background", "already"),
        (" ", "needs a name"),
    ):
        tab.get_by_label("Name of concept 1").fill(text)
        tab.get_by_label("Name of concept 1").press("Enter")
        assert message in tab.inner_text("#failure")
    tab.get_by_role("button", name="Add concept").click()
    settle(tab)
    assert tab.evaluate("[paint.concepts, view.concept]") == [
        ["concept 1", "concept 2", "concept 3"],
        2,
    ]
