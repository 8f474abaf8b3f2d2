"""Resampling and exchange of whole units, against brute force; F1 against sklearn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from llava_bidir.vqa.scores import Column, ScoreTerms, f1, mme_points, swap_test


def items(right, units=None, group=None) -> list[dict]:
    units = range(len(right)) if units is None else units
    return [
        {
            "unit": unit,
            "group": group,
            "right": float(r),
        }
        for unit, r in zip(units, right, strict=True)
    ]


def test_images_are_resampled_within_their_category_of_mme():
    """Brute force: draw images per category and compute the score from scratch."""
    rng = np.random.default_rng(2)
    sizes = {"existence": 5, "count": 30}
    answers = [
        i
        for c, n in sizes.items()
        for i in items(rng.random(2 * n) < 0.6, np.repeat(np.arange(n), 2), c)
    ]
    terms = Column("", mme_points, "existence count").terms(answers)
    pairs = {
        c: np.array([i["right"] for i in answers if i["group"] == c]).reshape(-1, 2) for c in sizes
    }

    def score(drawn):
        return sum(100 * (p.mean() + p.all(1).mean()) for p in drawn.values())

    assert terms.score() == pytest.approx(score(pairs))
    brute = [
        score({c: p[rng.integers(len(p), size=len(p))] for c, p in pairs.items()})
        for _ in range(4000)
    ]
    ours = terms.resampled_scores(4000)
    assert (ours.mean().item(), ours.std().item()) == pytest.approx(
        (np.mean(brute), np.std(brute)), rel=0.05
    )


def test_ratios_swap_their_denominators_too():
    """Terms as of F1, against all 16 exchanges of four units."""
    rng = np.random.default_rng(5)
    num = [rng.integers(0, 5, 4).astype(float) for _ in range(2)]
    den = [rng.integers(5, 9, 4).astype(float) for _ in range(2)]
    terms = [ScoreTerms(np.stack(x), np.zeros(4, int)) for x in zip(num, den, strict=True)]
    differences = []
    for sides in range(16):
        coin = np.array([sides >> u & 1 for u in range(4)])
        n = [np.where(coin, num[1 - k], num[k]).sum() for k in range(2)]
        d = [np.where(coin, den[1 - k], den[k]).sum() for k in range(2)]
        differences.append(n[1] / d[1] - n[0] / d[0])
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
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
