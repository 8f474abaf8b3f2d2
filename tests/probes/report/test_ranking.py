"""What is said of several models and masks, from their scores and the findings about their differences."""

from types import SimpleNamespace

import pytest
from report_parts import reading

from probes.report.hero import plain_text
from probes.report.parts import panels
from probes.report.ranking import Rival, ranking, resize_note, would_show
from probes.report.readings import Name, SiteReading

SITES = ("layer_00", "layer_01", "layer_02", "layer_03")


def model(key: str, *scores: float) -> SiteReading:
    """An encoder whose layers have these scores."""
    made = reading(dict(zip(SITES, scores, strict=False)), has_llm=False)
    made.model.key = key
    return made


LEAD = model("B", 0.2, 0.491, 0.45)
LAST = model("A", 0.2, 0.3, 0.469)


def said(lead: SiteReading, *rivals: Rival) -> str:
    view = SimpleNamespace(lead=lead, best=lambda reading: reading.best_layer)
    names = {}
    for made in (lead, *(rival.reading for rival in rivals)):
        names[made.token.strip("{}")] = Name(made.model.key, f"model{made.model.key}")
    return plain_text(ranking(view, rivals), names)


@pytest.mark.parametrize(
    ("rivals", "text"),
    [
        (
            [Rival(LAST, "undecided", value=0.022, low=0.0, high=0.072)],
            "B modelB reads best: 49.1% mIoU at layer 1. A modelA reads 46.9% at layer 2, its last: 2.2 points less, "
            "which 20 photos do not show.",
        ),
        (
            [Rival(LAST, "better", value=0.022, low=0.01, high=0.03)],
            "B modelB reads best: 49.1% mIoU at layer 1. A modelA reads 46.9% at layer 2, its last: 2.2 points less.",
        ),
        (
            [Rival(LAST, "no effect", value=0.002, low=-0.005, high=0.009)],
            "B modelB and A modelA read alike: 49.1% mIoU, at layer 1 and layer 2. They differ by 0.2 points; a "
            "difference of one point is ruled out.",
        ),
        (
            [Rival(LAST)],
            "B modelB reads best: 49.1% mIoU at layer 1. A modelA reads 46.9% at layer 2, its last; the two cannot be "
            "compared.",
        ),
        (
            [
                Rival(LAST, "undecided", value=0.022, low=-0.01, high=0.05),
                Rival(model("C", 0.2, 0.4, 0.1), "better", value=0.091, low=0.05, high=0.1),
                Rival(model("D", 0.2, 0.3, 0.1), "negligible", value=0.191, low=0.1, high=0.2),
            ],
            "B modelB reads best: 49.1% mIoU at layer 1. Then A modelA (46.9, not shown to be less), C modelC (40.0, "
            "9.1 less), D modelD (30.0, no less).",
        ),
        (
            [Rival(LAST), Rival(model("C", 0.2, 0.4, 0.1), "better", value=0.091)],
            "B modelB reads best: 49.1% mIoU at layer 1. Then C modelC (40.0, 9.1 less), and 1 not compared.",
        ),
    ],
)
def test_which_reads_best_is_said_with_what_is_shown(rivals, text):
    assert said(LEAD, *rivals) == text


def test_a_finding_that_is_not_shown_says_what_would_show_it():
    """Four times the photos halve an interval."""
    undecided = Rival(LAST, "undecided", value=0.025, low=0.0, high=0.09, detectable=0.05)
    assert would_show(undecided, 20, "photo") == "20 photos would show 5.0; about 80 photos, 2.5."
    tiny = Rival(LAST, "undecided", value=0.001, low=-0.04, high=0.04, detectable=0.05)
    assert would_show(tiny, 20, "photo") == "20 photos would show 5.0."
    assert (
        would_show(Rival(LAST, "better", value=0.2, low=0.1, high=0.3, detectable=0.1), 20, "photo")
        == ""
    )


def test_models_that_see_photos_otherwise_are_said_to():
    padded = SimpleNamespace(resize="pad")
    assert resize_note(Rival(LAST), LEAD) == ""
    assert resize_note(Rival(padded), LEAD) == " Their photos differ: squashed and padded."


def test_a_small_figure_has_the_layers_of_its_own_model():
    """At equal relative depth layer 1 of two stands where layer 2 of four does, and is called 1."""
    deep = reading({f"layer_0{i}": 0.1 * i for i in range(5)}, has_llm=False)
    shallow = model("A", 0.1, 0.2, 0.3)
    for made, key in ((deep, "B"), (shallow, "A")):
        made.model.key, made.model.label, made.model.number = key, key, 0
        made.draws.clear()
        for row in made.rows:
            row.low, row.high, row.value_ci = row.value, row.value, ""
    of_deep, of_shallow = panels([deep, shallow], ["causal"], together=True)
    assert of_deep["chart"].ticks == {i: str(i) for i in range(5)}
    assert of_shallow["chart"].ticks == {0: "0", 2: "1", 4: "2"}
