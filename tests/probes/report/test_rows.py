"""What a row says beside its number, reasons in few words, labels, and the page of one run."""

import json
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
from report_parts import CURVE, reading, studies_of

from probes.cli import main
from probes.report.parts import as_read, explain, in_few_words, is_about_nothing
from probes.runs.study import read_studies

SCORES = {"layer_00": 0.2, "layer_01": 0.491, "layer_02": 0.451}


def row(claim: str, value: float, **more) -> SimpleNamespace:
    """A verdict about the model A."""
    about = {"task": "segmentation", "data": "toy", "model": "A", "mask": "causal", "seed": 0}
    text = {"value": value, "value_text": f"{100 * value:+.1f}".replace("-", "\u2212")}
    verdict = {"optimum_verdict": "holds", "finding": "supported", "would_show": float("nan")}
    return SimpleNamespace(claim=claim, **about, **text, **verdict | more)


def view() -> SimpleNamespace:
    made = reading(SCORES, has_llm=False)
    made.model.last_layer = "layer_02"
    return SimpleNamespace(readings=[made])


@pytest.mark.parametrize(
    ("claim", "value", "text"),
    [
        (
            "over_last",
            -0.007,
            "49.1 − 45.1 = +4.0 as read; −0.7 with the layer chosen on other photos",
        ),
        ("over_last", 0.035, ""),  # it differs by less than a point
        (
            "layer_gain",
            0.2,
            "49.1 − 20.0 = +29.1 as read; +20.0 with the layer chosen on other photos",
        ),
        ("starvation", 0.2, ""),  # of no layer
        ("recovery", 0.2, ""),  # the encoder has no adapter
    ],
)
def test_a_number_that_its_curve_does_not_show_is_explained(claim, value, text):
    assert as_read(view(), row(claim, value)) == text


def test_what_does_not_hold_says_what_would_have_been_shown():
    open_row = row("over_last", 0.04, finding="undecided", would_show=0.028)
    assert explain(view(), open_row) == "too few photos to tell: would show from 2.8 points"
    assert explain(view(), row("over_last", 0.04)) == ""


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (
            "no solved probes: run the study again with --fit",
            "no solved probes: run the study again with --fit",
        ),
        ("draws: 0, two: " + "a " * 16 + ": which modules are meant", "which modules are meant"),
        ("draws: 0, " + "a " * 11 + "; draws: 0, " + "b " * 11, "draws: 0," + " a" * 11),
        ("w " * 30, "w " * 20 + "…"),
    ],
)
def test_reasons_have_at_most_20_words(reason, text):
    assert in_few_words(reason) == text


def test_a_claim_about_nothing_has_no_row():
    """The best layer is the last one in almost all resamplings; results.json has the claim."""
    ends = {"low": [0.0, -7e-5, 0.0, -0.1, None], "high": [0.0, 7e-5, 0.1, 0.0, None]}
    assert is_about_nothing(pd.DataFrame(ends)).tolist() == [True, True, False, False, False]


def test_labels_are_those_of_the_user_where_masks_differ(write, tmp_path):
    study = tmp_path / "study"
    for label, mask in (("before", "causal"), ("after", "bidirectional")):
        shutil.move(write(label, CURVE, mask=mask), study / label / "trained")
    (of_study,) = read_studies([str(study)], labels=("before", "after"))
    assert [run.label for run in of_study.main_runs.values()] == ["before", "after"]
    (named,) = read_studies([f"A={study}"], labels=("before", "after"))
    assert [run.label for run in named.main_runs.values()] == ["A before", "A after"]
    (unlabelled,) = read_studies([str(study)])
    assert [run.label for run in unlabelled.main_runs.values()] == [None, None]


def test_one_model_has_the_label_of_its_user(write, tmp_path):
    study = tmp_path / "study"
    shutil.move(write("a", CURVE), study / "mine" / "trained")
    (of_study,) = read_studies([str(study)], labels=("mine",))
    assert (of_study.name, of_study.first.label) == ("mine", None)
    (named,) = read_studies([f"six={study}"], labels=("mine",))
    assert (named.name, named.first.label) == ("six", None)


def test_a_run_by_itself_has_a_page_that_says_what_it_lacks(write, tmp_path, capsys):
    run = write("run", CURVE, solved=True)
    main(["report", run, "--out", str(tmp_path / "report")])
    page = (tmp_path / "report/index.html").read_text()
    assert "No random models were solved" in page and "probes study" in page
    assert "probes lab" in capsys.readouterr().out


def test_models_may_resize_photos_in_different_ways(write):
    """Runs of one model may not."""
    first = write("a", CURVE)
    second = write("b", CURVE, image_resize="pad")
    studies = studies_of([f"A={first}", f"B={second}"])
    assert len(studies) == 2
    with pytest.raises(ValueError, match="differ in image_resize"):
        studies_of([write("c", CURVE), write("d", CURVE, mask="bidirectional", image_resize="pad")])


@pytest.mark.parametrize(
    ("other", "shown"), [({}, 2), ({"grid": [1, 1]}, 1), ({"image_resize": "pad"}, 1)]
)
def test_the_lab_that_is_next_can_be_opened(write, tmp_path, other, shown):
    """Of models whose patches differ it is that of one; else the command that the report prints fails."""
    studies = [f"A={write('a', CURVE, solved=True)}"]
    studies.append(f"B={write('b', CURVE, 1, solved=True, mllm='b', **other)}")
    main(["report", *studies, "--out", str(tmp_path / "report")])
    lab = json.loads((tmp_path / "report/results.json").read_text())["lab"]
    assert len(lab.split()) == 2 + shown
