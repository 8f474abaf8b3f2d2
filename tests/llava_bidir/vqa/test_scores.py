"""Resampling and exchange of whole units, against brute force and scipy."""

import numpy as np
import pytest

from llava_bidir.vqa.scores import ScoreTerms, accuracy_terms, mme_terms, swap_test


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


def test_questions_of_one_image_are_resampled_together():
    """Ten questions per image, all right or all wrong: the uncertainty is that of the images."""
    right = np.repeat(np.random.default_rng(1).random(40) < 0.5, 10)
    by_image = accuracy_terms(items(right, np.repeat(np.arange(40), 10))).resampled_scores(4000)
    assert by_image.std() == pytest.approx(right.std() / 40**0.5, rel=0.05)
    by_question = accuracy_terms(items(right)).resampled_scores(4000)
    assert by_question.std() == pytest.approx(right.std() / 400**0.5, rel=0.05)


def test_images_are_resampled_within_their_category_of_mme():
    """Brute force: draw images per category and compute the score from scratch."""
    rng = np.random.default_rng(2)
    sizes = {"existence": 5, "count": 30}
    answers = [
        i
        for c, n in sizes.items()
        for i in items(rng.random(2 * n) < 0.6, np.repeat(np.arange(n), 2), c)
    ]
    terms = mme_terms(["existence", "count"])(answers)
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
    num = [rng.integers(0, 5, (4, 1)).astype(float) for _ in range(2)]
    den = [rng.integers(5, 9, (4, 1)).astype(float) for _ in range(2)]
    terms = [
        ScoreTerms(n, d, list(range(4)), np.zeros(4, int)) for n, d in zip(num, den, strict=True)
    ]
    differences = []
    for sides in range(16):
        coin = np.array([sides >> u & 1 for u in range(4)])[:, None]
        n = [np.where(coin, num[1 - k], num[k]).sum() for k in range(2)]
        d = [np.where(coin, den[1 - k], den[k]).sum() for k in range(2)]
        differences.append(n[1] / d[1] - n[0] / d[0])
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    assert swap_test(*terms, 40_000) == pytest.approx(exact, abs=0.01)
