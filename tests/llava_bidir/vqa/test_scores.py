"""Resampling and exchange of whole units, against brute force; F1 against sklearn."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import f1_score

from llava_bidir.vqa.scores import Column, ScoreTerms, f1, mme_points, swap_test


def test_images_are_resampled_within_their_category_of_mme():
    """Brute force: draw images per category and compute the score from scratch."""
    rng = np.random.default_rng(2)
    pairs = {"existence": rng.random((5, 2)) < 0.6, "count": rng.random((30, 2)) < 0.6}
    answers = [
        {"unit": unit, "group": group, "right": float(right)}
        for group, units in pairs.items()
        for unit, rights in enumerate(units)
        for right in rights
    ]
    terms = Column("", mme_points, "existence count").terms(answers)

    def score(drawn):
        return sum(100 * (p.mean() + p.all(1).mean()) for p in drawn)

    assert terms.score() == pytest.approx(score(pairs.values()))
    brute = [
        score(p[rng.integers(len(p), size=len(p))] for p in pairs.values()) for _ in range(4000)
    ]
    ours = terms.resampled_scores(4000)
    assert ours.mean().item() == pytest.approx(np.mean(brute), rel=0.05)
    assert ours.std().item() == pytest.approx(np.std(brute), rel=0.05)


def test_ratios_swap_their_denominators_too():
    """Terms as of F1, against all 16 exchanges of four units."""
    rng = np.random.default_rng(5)
    ratios = np.stack([rng.integers(0, 5, (2, 4)), rng.integers(5, 9, (2, 4))], 1).astype(float)
    terms = [ScoreTerms(ratio, np.zeros(4, int)) for ratio in ratios]
    differences = []
    for swapped in itertools.product([False, True], repeat=4):
        sums = np.where(swapped, ratios[::-1], ratios).sum(-1)
        differences.append(abs(np.diff(sums[:, 0] / sums[:, 1])))
    exact = np.mean(np.array(differences) >= differences[0] - 1e-12)
    assert swap_test(*terms, 40_000) == pytest.approx(exact, abs=0.01)


def test_f1_equals_sklearns_for_yes_and_no():
    rng = np.random.default_rng(0)
    truth, said = (rng.random((2, 200)) < 0.4).astype(int)
    answers = [
        {"unit": i // 3, "group": None} | {"answer": ("No", "Yes")[s], "target": ("no", "yes")[t]}
        for i, (s, t) in enumerate(zip(said, truth, strict=True))
    ]
    assert Column("", f1).terms(answers).score() == pytest.approx(f1_score(truth, said))
    assert Column("", f1).terms([answers[0] | {"answer": "maybe", "target": "yes"}]).score() == 0
