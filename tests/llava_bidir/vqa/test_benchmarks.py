"""Scores from items, by hand and against sklearn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from llava_bidir import cli
from llava_bidir.vqa.benchmarks import (
    BENCHMARKS,
    COGNITION,
    PERCEPTION,
    TABLE1,
    circular,
    f1,
    letter,
    mean,
    mme,
    starts_with_yes_or_no,
    yes_or_no,
)


def item(right, unit=0, group=None, answer="", target=""):
    return {"right": right, "unit": unit, "group": group, "answer": answer, "target": target}


def test_mean_counts_items_and_keeps_units():
    parts = mean([item(1.0, "a"), item(0.0, "a"), item(0.3, "b")])
    assert parts.score() == pytest.approx(1.3 / 3) and len(parts.units) == 2


def test_a_question_of_mmbench_counts_only_with_all_its_orders():
    found = [item(1, 7), item(1, 7), item(1, 8), item(0, 8)]
    assert circular(found).score() == 0.5


def test_mme_adds_accuracy_and_pairs_over_categories():
    found = [item(1, "x", "existence"), item(1, "x", "existence"), item(1, "y", "existence"), item(0, "y", "existence")]
    found += [item(0, "x", "OCR"), item(1, "x", "OCR"), item(1, "z", "code_reasoning"), item(1, "z", "code_reasoning")]
    assert mme(PERCEPTION)(found).score() == pytest.approx((75 + 50) + (50 + 0))
    assert mme(COGNITION)(found).score() == 200
    assert len(PERCEPTION) == 10 and len(COGNITION) == 4


def test_f1_is_sklearns_where_all_answers_are_yes_or_no():
    rng = np.random.default_rng(0)
    truth, said = (rng.random((2, 200)) < 0.4).astype(int)
    found = [
        item(0, i // 3, answer=("No", "Yes")[s], target=("no", "yes")[t])
        for i, (s, t) in enumerate(zip(said, truth, strict=True))
    ]
    assert f1(found).score() == pytest.approx(f1_score(truth, said))
    assert f1([item(0, answer="maybe", target="yes")]).score() == 0


@pytest.mark.parametrize(
    ("usable", "good", "bad"),
    [
        (letter, ["A", "B. sky", "(C)", "answer: D."], ["", "sky", "ABLE"]),
        (yes_or_no, ["Yes", " no "], ["Yes.", "Yes, there is", "maybe"]),
        (starts_with_yes_or_no, ["Yes.", "no way", "Y"], ["maybe", "the answer is yes", ""]),
    ],
)
def test_answers_of_the_kind_asked_for(usable, good, bad):
    assert all(map(usable, good)) and not any(map(usable, bad))


def test_command_offers_every_benchmark():
    assert cli.VQA == list(BENCHMARKS) and cli.VQA[:-1] == TABLE1


def test_table_has_the_papers_columns_in_its_order():
    printed = [c.paper for name in TABLE1 for c in BENCHMARKS[name].columns.values() if c.paper]
    assert printed == ["GQA", "MMB", "MME_P", "MME_C", "MMMU", "POPE", "SQA_I", "TextVQA", "VizWiz"]
