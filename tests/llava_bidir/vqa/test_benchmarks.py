"""Scores from items, by hand and against sklearn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from llava_bidir import cli
from llava_bidir.vqa.benchmarks import BENCHMARKS, COGNITION, PERCEPTION, TABLE1
from llava_bidir.vqa.scores import accuracy_terms, circular_terms, f1_terms, mme_terms


def item(
    right,
    unit=0,
    group=None,
    answer="",
    target="",
):
    return {
        "right": right,
        "unit": unit,
        "group": group,
        "answer": answer,
        "target": target,
    }


def test_mean_counts_items_and_keeps_units():
    terms = accuracy_terms([item(1.0, "a"), item(0.0, "a"), item(0.3, "b")])
    assert terms.score() == pytest.approx(1.3 / 3) and len(terms.units) == 2


def test_a_question_of_mmbench_counts_only_with_all_its_orders():
    items = [item(1, 7), item(1, 7), item(1, 8), item(0, 8)]
    assert circular_terms(items).score() == 0.5


def test_mme_adds_accuracy_and_pairs_over_categories():
    items = [
        item(1, "x", "existence"),
        item(1, "x", "existence"),
        item(1, "y", "existence"),
        item(0, "y", "existence"),
    ]
    items += [
        item(0, "x", "OCR"),
        item(1, "x", "OCR"),
        item(1, "z", "code_reasoning"),
        item(1, "z", "code_reasoning"),
    ]
    assert mme_terms(PERCEPTION)(items).score() == pytest.approx((75 + 50) + (50 + 0))
    assert mme_terms(COGNITION)(items).score() == 200
    assert len(PERCEPTION) == 10 and len(COGNITION) == 4


def test_f1_equals_sklearns_for_yes_and_no():
    rng = np.random.default_rng(0)
    truth, said = (rng.random((2, 200)) < 0.4).astype(int)
    items = [
        item(0, i // 3, answer=("No", "Yes")[s], target=("no", "yes")[t])
        for i, (s, t) in enumerate(zip(said, truth, strict=True))
    ]
    assert f1_terms(items).score() == pytest.approx(f1_score(truth, said))
    assert f1_terms([item(0, answer="maybe", target="yes")]).score() == 0


def test_command_offers_every_benchmark():
    assert cli.VQA == list(BENCHMARKS) and cli.VQA[:-1] == TABLE1
